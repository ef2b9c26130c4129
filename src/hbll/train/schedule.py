"""Learning-rate schedules by name, all of torch's own schedulers."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler

from hbll.recipes import Schedule


def scheduler(name: Schedule, optimizer: Optimizer, steps: int) -> LRScheduler:
    """The schedule over a run of `steps` optimizer steps; its `step()` is called after each of them."""
    match name:
        case "constant":
            return ConstantLR(optimizer, factor=1.0, total_iters=0)
        case "linear":
            return LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=steps)
        case "cosine":
            return CosineAnnealingLR(optimizer, T_max=steps)
