"""Optimizers by name, for all parameters of a rule."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import AdamW, Muon, NAdam, Optimizer

from hbll.names import check_known
from hbll.rule import Rule
from hbll.train.error_feedback import ErrorFeedback

__all__ = ["OPTIMIZERS", "make_optimizers"]

OPTIMIZERS = ("adamw", "muon", "nadam")


def make_optimizers(
    rule: Rule,
    name: str,
    learning_rate: float,
    weight_decay: float,
    *,
    error_feedback: bool = False,
    parameters: Iterable[nn.Parameter] | None = None,
) -> list[Optimizer]:
    """What moves the parameters of a rule.

    Args:
        rule: the rule.
        name: `adamw`; `muon` (Jordan et al. 2024) for the matrices inside blocks, kernels of 1 x 1 convolutions among them,
            and inside those modules of the rule that are copies of blocks, its updates of the size that AdamW's have (Liu
            et al., arXiv 2502.16982), and AdamW at the same rate and decay for all others; or `nadam`, Nesterov's momentum
            with a beta1 of .99 and decoupled decay, made for gradients that come late (Ajanthan et al., arXiv 2505.01099).
        learning_rate: of all of them.
        weight_decay: of all of them.
        error_feedback: whether each update is corrected by the change since the last, for gradients that come late.
        parameters: those of the rule's that are moved, such as a stage's; by default all.

    Raises:
        ValueError: an unknown name, or blocks without matrices for muon.
    """
    check_known(name, OPTIMIZERS, "optimizer")
    held = dict.fromkeys(rule.parameters() if parameters is None else parameters)
    matrices = [matrix for matrix in _matrices(rule) if matrix in held] if name == "muon" else []
    known = set(matrices)
    others = [parameter for parameter in held if parameter not in known]
    optimizers: list[Optimizer] = []
    if matrices:
        optimizers.append(
            MatrixMuon(matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        )
    if name == "nadam":
        optimizers.append(
            NAdam(others, lr=learning_rate, betas=(0.99, 0.999), weight_decay=weight_decay, decoupled_weight_decay=True)
        )
    elif others:
        optimizers.append(AdamW(others, lr=learning_rate, weight_decay=weight_decay, fused=True))
    return [ErrorFeedback(optimizer) for optimizer in optimizers] if error_feedback else optimizers


class MatrixMuon(Muon):
    """torch's Muon, also for kernels (out, in, 1, ..), which are matrices (out, in).

    Args:
        matrices: to move.
        options: as of ``torch.optim.Muon``.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], **options: Any) -> None:
        matrices = list(matrices)
        with _flat(matrices):
            super().__init__(matrices, **options)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with _flat([matrix for group in self.param_groups for matrix in group["params"]]):
            super().step()
        return loss


@contextmanager
def _flat(matrices: Iterable[nn.Parameter]) -> Iterator[None]:
    """Gives kernels and their gradients two dimensions for a while."""
    kernels = {kernel: kernel.shape for kernel in matrices if kernel.ndim > 2}

    def reshape(kernel: nn.Parameter, *shape: int) -> None:
        gradient, kernel.grad = kernel.grad, None
        kernel.data = kernel.data.view(shape)
        kernel.grad = None if gradient is None else gradient.view(shape)

    for kernel, shape in kernels.items():
        reshape(kernel, *shape[:2])
    try:
        yield
    finally:
        for kernel, shape in kernels.items():
            reshape(kernel, *shape)


def _matrices(rule: Rule) -> list[nn.Parameter]:
    blocks = list(rule.network.blocks)
    beside = [module for stage in range(1, len(rule.stages) + 1) for module in rule.auxiliary(stage)]
    parts = (part for module in beside for part in module.modules())
    copies = [part for part in parts if any(_alike(part, block) for block in blocks)]
    modules = (module for part in [*blocks, *copies] for module in part.modules())
    found = dict.fromkeys(
        p for module in modules for p in module.parameters(recurse=False) if p.ndim == 2 or p is _kernel(module)
    )
    if not found:
        raise ValueError("muon moves the matrices inside blocks, and these have none: take adamw")
    return list(found)


def _kernel(module: nn.Module) -> nn.Parameter | None:
    """Of a convolution that mixes channels alone their matrix."""
    if isinstance(module, _ConvNd) and module.groups == 1 and set(module.kernel_size) == {1}:
        return cast("nn.Parameter", module.weight)
    return None


def _alike(module: nn.Module, block: nn.Module) -> bool:
    """Whether they are of one kind and size."""
    if type(module) is not type(block):
        return False
    sizes = [[(name, p.shape) for name, p in one.named_parameters()] for one in (module, block)]
    return sizes[0] == sizes[1]
