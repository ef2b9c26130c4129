"""Backpropagation on any sequence of modules, as the local rule of one block: what the others are to be compared with."""

from torch import Tensor

from hbll.local.rule import Blocks, LocalRule, LocalStep, local_cost
from hbll.losses import Loss, cross_entropy, mean_loss

__all__ = ["Backpropagation"]


class Backpropagation(LocalRule):
    """The label's loss, through the whole network."""

    def __init__(self, loss: Loss = cross_entropy) -> None:
        super().__init__(blocks=1, loss=loss)

    def step(self, blocks: Blocks, x: Tensor, y: Tensor) -> LocalStep:
        (segment,) = blocks.segments
        return LocalStep([mean_loss(self.loss, blocks.head.module(segment(x)), y)], *local_cost([segment]))
