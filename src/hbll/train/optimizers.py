"""Optimizers by name, for all parameters of a rule."""

from collections.abc import Iterable

from torch import nn
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
        name: `adamw`; `muon` (Jordan et al. 2024) for the matrices inside blocks, and inside those modules of the rule
            that are copies of blocks, its updates of the size that AdamW's have (Liu et al., arXiv 2502.16982), and AdamW
            at the same rate and decay for all others; or `nadam`, Nesterov's momentum with a beta1 of .99 and decoupled
            decay, made for gradients that come late (Ajanthan et al., arXiv 2505.01099).
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
        optimizers.append(Muon(matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
    if name == "nadam":
        optimizers.append(
            NAdam(others, lr=learning_rate, betas=(0.99, 0.999), weight_decay=weight_decay, decoupled_weight_decay=True)
        )
    elif others:
        optimizers.append(AdamW(others, lr=learning_rate, weight_decay=weight_decay, fused=True))
    return [ErrorFeedback(optimizer) for optimizer in optimizers] if error_feedback else optimizers


def _matrices(rule: Rule) -> list[nn.Parameter]:
    blocks = list(rule.network.blocks)
    beside = [module for stage in range(1, len(rule.stages) + 1) for module in rule.auxiliary(stage)]
    parts = (part for module in beside for part in module.modules())
    copies = [part for part in parts if any(_alike(part, block) for block in blocks)]
    found = dict.fromkeys(p for module in [*blocks, *copies] for p in module.parameters() if p.ndim == 2)
    if not found:
        raise ValueError("muon moves the matrices inside blocks, and these have none: take adamw")
    return list(found)


def _alike(module: nn.Module, block: nn.Module) -> bool:
    """Whether they are of one kind and size."""
    if type(module) is not type(block):
        return False
    sizes = [[(name, p.shape) for name, p in one.named_parameters()] for one in (module, block)]
    return sizes[0] == sizes[1]
