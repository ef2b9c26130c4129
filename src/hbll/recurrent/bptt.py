"""Backpropagation through time, the exact gradient of the chain: step by step, or by torch's fused networks."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.func import functional_call

from hbll.losses import Loss, cross_entropy, mean_loss
from hbll.recurrent.cost import backpropagation_cost
from hbll.recurrent.network import RecurrentNetwork, walk
from hbll.recurrent.rule import RecurrentRule, note
from hbll.rule import StageLoss, Step

__all__ = ["Backpropagation", "FusedBackpropagation"]


class Backpropagation(RecurrentRule):
    """One call of the cell per time step, and autograd back through all of them: work 3N, span 2N."""

    def losses_in_time(self, x: Tensor, y: Tensor, present: Tensor | None, step: Step) -> Iterator[StageLoss]:
        value = mean_loss(self.loss, self.network.head(self._read(x, present)), y, self.read(present))
        note(step, value, backpropagation_cost(len(x)), len(x))
        yield StageLoss(1, value)

    def _read(self, x: Tensor, present: Tensor | None) -> Tensor:
        """The hidden states that the head reads, (B, N, H) or (B, H), with the graph of the whole chain."""
        cell = self.network.cell
        hidden, _ = walk(cell, x, cell.initial(x.shape[1]), present)
        return torch.stack(hidden, 1) if self.network.every_step else hidden[-1]


class FusedBackpropagation(Backpropagation):
    """The same gradient from nn.GRU or nn.LSTM, which run whole sequences in one call (cuDNN's on a GPU).

    Args:
        network: the network to train.
        loss: the label's loss.

    Raises:
        ValueError: torch has no fused network for the cell.
    """

    def __init__(self, network: RecurrentNetwork, *, loss: Loss = cross_entropy) -> None:
        super().__init__(network, loss=loss)
        # Used for what it computes, with the network's weights in place of its own, which are no part of the rule.
        self._fused = [network.export_sequence()]

    def _read(self, x: Tensor, present: Tensor | None) -> Tensor:
        if present is not None:
            raise ValueError("the fused baseline needs sequences of equal length; bptt takes unequal ones")
        weights: dict[str, Tensor] = {f"{name}_l0": value for name, value in self.network.cell.named_parameters()}
        hidden, _ = functional_call(self._fused[0], weights, (x.transpose(0, 1),))
        return hidden.contiguous() if self.network.every_step else hidden[:, -1].contiguous()
