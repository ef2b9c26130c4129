"""What every training rule for recurrent networks is, and the updates that several of them share."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hbll.calls import Readout
from hbll.cut import Stage
from hbll.losses import Loss, counts, cross_entropy, mean_loss
from hbll.models.cells import Slopes
from hbll.recurrent.cost import Cost
from hbll.recurrent.network import RecurrentNetwork, Sequences, check_network
from hbll.rule import Report, Rule, StageLoss, Step, attach_gradients

__all__ = ["LabelCredit", "RecurrentRule", "head_credit", "local_update", "note"]


class RecurrentRule(Rule):
    """A training rule for a recurrent network, which is one stage: its cells share the time steps.

    A step's reports are by time, the nodes of the tree over time; its work and span are those of ``hbll.recurrent.cost``.

    Args:
        network: the network to train.
        loss: the label's loss, one value per label; of a network whose every step is read, (B, N) of them.

    Raises:
        ValueError: it is no recurrent network.
    """

    network: RecurrentNetwork  # pyrefly: ignore[bad-override-mutable-attribute]  (no chain of blocks)

    trained: ClassVar[tuple[str, ...]] = ("chain",)
    """The readouts of a network that the rule trains, by the network's names."""

    def __init__(self, network: RecurrentNetwork, *, loss: Loss = cross_entropy) -> None:
        super().__init__(network, loss=loss)  # pyrefly: ignore[bad-argument-type]

    def cut(self) -> tuple[Stage, ...]:
        check_network(self.network)
        return (Stage(list(self.network.blocks), 1, 1),)  # with the cells of all depths

    @property
    def readouts(self) -> list[Readout]:
        """The readouts that the rule trains."""
        return [readout for readout in self.network.readouts if readout.name in self.trained]

    @property
    def parts(self) -> dict[str, nn.Module]:
        return {f"the {name}": part for name, part in self.network.named_children()}

    def losses(self, x: Sequences, y: Tensor, step: Step) -> Iterator[StageLoss]:
        """The losses of one training step, each walked back before the next is asked for.

        Args:
            x: sequences, or a pair of them and their lengths, as the network takes them.
            y: labels, (B, ...), or (B, N, ...) if the head reads every step; classes of -100 stand for none, and those of
                the padding do not count whatever they are.
            step: where the cost, and what is to be reported, is noted.

        Raises:
            ValueError: sequences, lengths or labels of a wrong shape, or labels outside the classes.
        """
        chunks, present = self.network.embedded(x)
        length, batch, _ = chunks.shape
        expected = (batch, length) if self.network.every_step else (batch,)
        if not isinstance(y, Tensor) or y.shape[: len(expected)] != expected:
            got = tuple(y.shape) if isinstance(y, Tensor) else f"a {type(y).__name__}"
            raise ValueError(f"{batch} sequences of {length} chunks need labels {expected}; got {got}")
        if self.network.every_step and present is not None:
            # Those of the padding are not counted; until then a loss is to find labels that it takes, the sequence's last.
            y = torch.where(present.view(*expected, *(1,) * (y.ndim - 2)), y, y[:, -1:])
        counted = counts(self.loss, y)
        for loss in self.losses_in_time(chunks, y, present, step):
            yield loss.times(counted)

    def read(self, present: Tensor | None) -> Tensor | None:
        """Which labels (B, N) count, of sequences with padding whose every step is read; None if all do."""
        return present if self.network.every_step else None

    @abstractmethod
    def losses_in_time(self, x: Tensor, y: Tensor, present: Tensor | None, step: Step) -> Iterator[StageLoss]:
        """``losses`` of checked input, time first.

        Args:
            x: (N, B, I), the chunks, with the graph of the network's embed.
            y: (B, ...) or (B, N, ...).
            present: (B, N), false for the padding; None if there is none.
            step: as for ``losses``.
        """

    def diagnose(self, x: Sequences, y: Tensor) -> dict[int, Report]:
        """The errors of one batch's nodes; nothing is learnt from it and no gradient is left behind."""
        with torch.no_grad():
            return self(x, y).reports


@dataclass(frozen=True)
class LabelCredit:
    """What the label says to given hidden states."""

    loss: Tensor
    """The mean loss, without graph."""
    credit: Tensor
    """Its gradient in the hidden states."""
    weights: list[nn.Parameter]
    """The head's trainable weights that it used."""
    gradients: Sequence[Tensor]
    """Its gradients in them."""


def head_credit(
    network: RecurrentNetwork, loss: Loss, hidden: Tensor, y: Tensor, counted: Tensor | None
) -> LabelCredit:
    """The label's loss on given hidden states, (B, H), or (N, B, H) if every step is read, as far as labels are counted, and
    its gradients."""
    weights = [p for p in network.head.parameters() if p.requires_grad]
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_()
        read = leaf.transpose(0, 1).contiguous() if network.every_step else leaf  # as the network's own head has it
        value = mean_loss(loss, network.head(read), y, counted)
    credit, *found = torch.autograd.grad(value, [leaf, *weights], allow_unused=True)
    used = [(weight, gradient) for weight, gradient in zip(weights, found, strict=True) if gradient is not None]
    credit = torch.zeros_like(hidden) if credit is None else credit
    return LabelCredit(value.detach(), credit, [weight for weight, _ in used], [gradient for _, gradient in used])


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


def note(step: Step, loss: Tensor, cost: Cost, length: int) -> None:
    """Notes the label's mean loss, reported at the time N where it is read, and the cost of a step."""
    step.label_loss = loss.detach()
    step.report([length], error=loss.unsqueeze(0))
    step.count(cost.work, cost.span)
