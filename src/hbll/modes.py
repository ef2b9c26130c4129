"""Whether modules train: their modes, and their parameters."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["evaluating", "is_trained"]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """The module in evaluation mode, in which running statistics stand still; afterwards as it was."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def is_trained(module: nn.Module) -> bool:
    """Whether a module has parameters that are not frozen."""
    return any(parameter.requires_grad for parameter in module.parameters())
