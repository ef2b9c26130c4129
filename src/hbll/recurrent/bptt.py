"""Backpropagation through time, the exact gradient of the chain: step by step, or by torch's fused networks."""

import torch
from torch import Tensor
from torch.func import functional_call

from hbll.losses import Loss, cross_entropy, mean_loss
from hbll.recurrent.cost import backpropagation_cost
from hbll.recurrent.network import RecurrentNetwork, walk
from hbll.recurrent.step import RecurrentRule, RecurrentStep

__all__ = ["Backpropagation", "FusedBackpropagation"]


class Backpropagation(RecurrentRule):
    """One call of the cell per time step, and autograd back through all of them: work 3N, span 2N."""

    def step(self, network: RecurrentNetwork, x: Tensor, y: Tensor, present: Tensor | None) -> RecurrentStep:
        hidden, _ = walk(network.cell, x, network.cell.initial(x.shape[1]), present)
        return exact_step(network, torch.stack(hidden) if network.every_step else hidden[-1], y, len(x), self.loss)


class FusedBackpropagation(RecurrentRule):
    """The same gradient from nn.GRU or nn.LSTM, which run whole sequences in one call (cuDNN's on a GPU).

    Args:
        network: a network like those that will be trained; only its shapes are read.
        loss: the label's loss.

    Raises:
        ValueError: torch has no fused network for the cell.
    """

    def __init__(self, network: RecurrentNetwork, loss: Loss = cross_entropy) -> None:
        super().__init__(loss)
        # Used for what it computes, with the network's weights in place of its own.
        self._fused = [network.export_sequence()]

    def step(self, network: RecurrentNetwork, x: Tensor, y: Tensor, present: Tensor | None) -> RecurrentStep:
        if present is not None:
            raise ValueError("the fused baseline needs sequences of equal length; method bptt takes unequal ones")
        weights: dict[str, Tensor] = {f"{name}_l0": value for name, value in network.cell.named_parameters()}
        hidden, _ = functional_call(self._fused[0], weights, (x.transpose(0, 1),))
        hidden = hidden.transpose(0, 1)
        return exact_step(network, hidden if network.every_step else hidden[-1], y, len(x), self.loss)


def exact_step(network: RecurrentNetwork, hidden: Tensor, y: Tensor, length: int, loss: Loss) -> RecurrentStep:
    """The step of hidden states that carry the graph of the whole chain."""
    value = mean_loss(loss, network.head(hidden), y)
    cost = backpropagation_cost(length)
    return RecurrentStep(value, cost.work, cost.span, {length: value.detach()})
