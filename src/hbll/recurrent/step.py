"""What every training rule for recurrent networks is: a module that is called with a network and a batch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from hbll.layout import Layout, Readout
from hbll.losses import Loss, cross_entropy, mean_loss
from hbll.models.cells import Slopes
from hbll.objective import NodeReport
from hbll.recurrent.network import RecurrentNetwork, check_sequences, presence
from hbll.trace import attach_gradients

__all__ = ["LabelCredit", "RecurrentRule", "RecurrentStep", "head_credit", "local_update"]


@dataclass(frozen=True)
class RecurrentStep:
    """What a call of a rule returns."""

    loss: Tensor
    """A scalar with graph; its gradients are the rule's updates."""
    work: int
    span: int
    """Both as in ``hbll.recurrent.cost``."""
    errors: dict[int, Tensor] = field(default_factory=dict)
    """The mean error of every node (time) that has one, in nats: scalars, so that nothing waits for the device."""
    defect: Tensor | None = None
    """How far the last sweep still moved the states, ||new - old|| / ||new||; None for a rule without sweeps."""
    sweeps: int = 0
    """Sweeps, or Newton iterations, that were made."""

    @property
    def nodes(self) -> dict[int, NodeReport]:
        """A report per node; asking waits for the device."""
        return {node: NodeReport(error.item()) for node, error in sorted(self.errors.items())}


@dataclass(frozen=True)
class LabelCredit:
    """What the label says to given hidden states."""

    loss: Tensor
    """The mean loss, without graph."""
    credit: Tensor
    """Its gradient in the hidden states."""
    weights: list[nn.Parameter]
    """The head's trainable weights."""
    gradients: Sequence[Tensor]
    """Its gradients in them."""


class RecurrentRule(nn.Module):
    """A training rule.

    Args:
        loss: the label's loss, one value per label.
    """

    trained: ClassVar[tuple[str, ...]] = ("chain",)
    """The readouts of a network that the rule trains, by the network's names."""

    def __init__(self, loss: Loss = cross_entropy) -> None:
        super().__init__()
        self.loss = loss

    def prepare(self, network: RecurrentNetwork, x: Tensor | None = None) -> Self:
        """Itself: a rule is made for its network."""
        return self

    def readouts(self, network: RecurrentNetwork) -> list[Readout]:
        """The readouts that the rule trains."""
        return [readout for readout in network.readouts if readout.name in self.trained]

    def layout(self, network: RecurrentNetwork) -> Layout:
        """Times by level of the tree: all arcs of a level, or all chunks, are evaluated at once."""
        parts = {f"the {name}": part for name, part in network.named_children()}
        return Layout("batched", parts, [node for level in network.tree.levels for node in level])

    def diagnose(self, network: RecurrentNetwork, x: Tensor, y: Tensor) -> dict[int, NodeReport]:
        """The reports of one batch; nothing is learnt from it and no gradient is left behind."""
        self.eval()
        try:
            return self(network, x, y).nodes
        finally:
            self.train()

    def forward(self, network: RecurrentNetwork, x: Tensor, y: Tensor, lengths: Tensor | None = None) -> RecurrentStep:
        """One training step up to the loss.

        Args:
            network: the network to train.
            x: what its embed takes; (B, N, I) afterwards, sequences of N chunks, shorter ones padded at the start.
            y: labels, (B,), or (B, N) if the head reads every step (-100 where there is none).
            lengths: (B,), the chunks of every sequence that are no padding; all by default.

        Raises:
            ValueError: sequences, lengths or labels of a wrong shape, or labels outside the classes.
        """
        x = network.embed(x)
        check_sequences(network, x)
        expected = x.shape[:2] if network.every_step else x.shape[:1]
        if y.shape[: len(expected)] != expected:
            raise ValueError(f"sequences {tuple(x.shape)} need labels {tuple(expected)}; got {tuple(y.shape)}")
        if network.every_step:
            y = y.transpose(0, 1)
        return self.step(network, x.transpose(0, 1), y, presence(lengths, x))

    def step(self, network: RecurrentNetwork, x: Tensor, y: Tensor, present: Tensor | None) -> RecurrentStep:
        """``forward`` on checked input, time first: x (N, B, I), y (B,) or (N, B); present (B, N) as of ``presence``."""
        raise NotImplementedError


def local_update(
    network: RecurrentNetwork,
    driven: Tensor,
    before: Tensor,
    slopes: Slopes,
    credit: Tensor,
    label: LabelCredit,
) -> Tensor:
    """The loss whose gradients move every step of the chain along its credit, all steps at once.

    Args:
        driven: (..., Γ H), the projected inputs, with graph.
        before: (..., S H), the states that the steps were made from.
        slopes: of the steps.
        credit: (..., S H), the gradients in the states that the steps made.
        label: what the head learns.
    """
    cell = network.cell
    recurrent, into_driven = slopes.gates(credit)
    recurrent = recurrent.flatten(0, -2)
    weight = recurrent.mT @ cell.hidden(before).flatten(0, -2)
    return attach_gradients(
        label.loss,
        [driven, cell.weight_hh, cell.bias_hh, *label.weights],
        [into_driven, weight, recurrent.sum(0), *label.gradients],
    )


def head_credit(network: RecurrentNetwork, loss: Loss, hidden: Tensor, y: Tensor) -> LabelCredit:
    """The label's loss on given hidden states (..., H) and labels (...), and its gradients."""
    weights = [p for p in network.head.parameters() if p.requires_grad]
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_()
        value = mean_loss(loss, network.head(leaf), y)
    credit, *gradients = torch.autograd.grad(value, [leaf, *weights])
    return LabelCredit(value.detach(), credit, weights, gradients)
