"""Whether modules train: their modes, and their parameters."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["evaluating", "is_trained", "looking", "still_statistics", "tracking_norms"]


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


@contextmanager
def looking(module: nn.Module) -> Iterator[None]:
    """The module as it trains: parts in the modes that they are in, or all in training mode if the module is not; afterwards
    modes, running statistics and torch's random numbers are as they were."""
    modes = {part: part.training for part in module.modules()}
    kept = {buffer: buffer.detach().clone() for buffer in module.buffers()}
    devices = {buffer.device for buffer in (*module.parameters(), *module.buffers()) if buffer.device.type == "cuda"}
    if not module.training:
        module.train()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode
        for buffer, value in kept.items():
            buffer.copy_(value)


def tracking_norms(module: nn.Module) -> tuple[_NormBase, ...]:
    """The parts of a module that keep running statistics."""
    return tuple(part for part in module.modules() if isinstance(part, _NormBase))


@contextmanager
def still_statistics(norms: Iterable[_NormBase]) -> Iterator[None]:
    """Norms in training go by their batch as ever, but leave their running statistics as they are."""
    kept = []
    for norm in norms:
        if norm.training and norm.track_running_stats:
            counts = [] if norm.num_batches_tracked is None else [norm.num_batches_tracked]
            kept.append((norm, norm.momentum, [(count, count.clone()) for count in counts]))
            norm.momentum = 0.0  # and not track_running_stats, without which a checkpoint would find other tensors
    try:
        yield
    finally:
        for norm, momentum, counts in kept:
            norm.momentum = momentum
            for count, value in counts:
                count.copy_(value)


def is_trained(module: nn.Module) -> bool:
    """Whether a module has parameters that are not frozen."""
    return any(parameter.requires_grad for parameter in module.parameters())
