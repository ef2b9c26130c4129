"""What every local rule on a network cut into blocks is: a module that is called with a network and a batch.

The network is any sequence of modules (``hbll.cuts``). Block k of K is a segment of it; it trains on a loss of its own, and
what it hands to the next block is detached. The head is no part of the segments: a rule says who trains it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from hbll.cuts import Part, Segment, cut, parts
from hbll.layout import Layout, Readout
from hbll.losses import Loss, cross_entropy, mean_loss
from hbll.network import evaluating
from hbll.objective import NodeReport, gradient_cosines

__all__ = ["Blocks", "LocalRule", "LocalStep", "detached_pass", "local_cost"]


@dataclass(frozen=True)
class LocalStep:
    """What a call of a local rule returns.

    Work and span are in the units of ``hbll.trace``: a part's forward evaluation, its vector-Jacobian product for the input
    and that for the parameters cost one each; embeds, heads, modules without parameters, auxiliary heads and feedback maps
    of one linear layer cost nothing. The backward pass through ``loss`` is counted in, made or not.
    """

    losses: Sequence[Tensor]
    """The local loss of each block, scalars with graph."""
    work: int
    """All evaluations."""
    span: int
    """The longest chain of evaluations in which each needs the one before."""
    credit: Mapping[int, Tensor] = field(default_factory=dict)
    """What a block's credit was differentiated from, with graph, where that is not the block's own loss."""
    defect: None = None
    """There are no sweeps."""

    @property
    def loss(self) -> Tensor:
        """The sum of the local losses; its gradients are the rule's updates."""
        return torch.stack(list(self.losses)).sum()

    @property
    def nodes(self) -> dict[int, NodeReport]:
        """A report per block, with its local loss as the error; asking waits for the device."""
        errors = torch.stack(list(self.losses)).tolist()
        return {k: NodeReport(error) for k, error in enumerate(errors, 1)}


@dataclass(frozen=True)
class Blocks:
    """A network as a local rule sees it."""

    segments: Sequence[Segment]
    """The K blocks."""
    head: Part
    """What gives the logits from the last block's output."""

    def evaluate(self, x: Tensor) -> list[Tensor]:
        """What each block hands on, and the logits."""
        return list(accumulate((*self.segments, self.head.module), lambda state, part: part(state), initial=x))[1:]


class LocalRule(nn.Module):
    """A training rule on blocks.

    A subclass defines ``step`` and, if it has parameters of its own, ``build``.

    Args:
        blocks: the number of blocks, or the parts after which to cut; by default every part with parameters is one
            (see ``hbll.cuts.cut``).
        balance: what a number of blocks evens out, ``count`` of parts or ``parameters``.
        loss: the label's loss, one value per sample.
    """

    def __init__(
        self,
        blocks: int | Sequence[int] | None = None,
        balance: Literal["count", "parameters"] = "count",
        loss: Loss = cross_entropy,
    ) -> None:
        super().__init__()
        self.blocks = blocks
        self.balance: Literal["count", "parameters"] = balance
        self.loss = loss
        self.prepared = False

    def cut(self, network: nn.Module) -> Blocks:
        """The network's blocks and its head.

        Raises:
            ValueError: the network has no parts to cut, or fewer than blocks.
        """
        *body, head = parts(network)
        return Blocks(cut(body, self.blocks, self.balance), head)

    def prepare(self, network: nn.Module, x: Tensor) -> Self:
        """Makes the parameters that the rule has beside the network's, for states as an input batch gives them.

        To be called before the optimizer is made, which then takes ``[*network.parameters(), *rule.parameters()]``.
        """
        with evaluating(network), torch.no_grad():
            *states, logits = self.cut(network).evaluate(x[:1])
        self.build([state.shape[1:] for state in states], logits.shape[-1])
        self.prepared = True
        return self.to(logits)  # on their device, in their precision

    def build(self, shapes: Sequence[torch.Size], classes: int) -> None:
        """Registers auxiliary modules; the shapes are those of each block's output, without the batch."""

    def forward(self, network: nn.Module, x: Tensor, y: Tensor) -> LocalStep:
        """One training step up to the loss.

        Args:
            network: the network to train.
            x: a batch of what its first module takes.
            y: its classes, (B,).

        Raises:
            ValueError: the labels are not one class for each sample, or the rule was not prepared.
        """
        if not self.prepared:
            raise ValueError(
                "a local rule sees the shapes of states before its first step: call rule.prepare(network, x)"
            )
        if y.shape != x.shape[:1] or y.is_floating_point():
            raise ValueError(
                f"local rules take one integer class for each of {len(x)} samples; got labels {tuple(y.shape)} of {y.dtype}"
            )
        return self.step(self.cut(network), x, y)

    def step(self, blocks: Blocks, x: Tensor, y: Tensor) -> LocalStep:
        """``forward`` on the cut network and checked labels."""
        raise NotImplementedError

    def auxiliary(self, k: int) -> list[nn.Module]:
        """The rule's own modules that belong to block k, counted from 1."""
        return []

    def diagnose(self, network: nn.Module, x: Tensor, y: Tensor) -> dict[int, NodeReport]:
        """The reports of one batch, with the cosine of each block's gradient to backpropagation's; leaves no gradient behind
        and no trace in running statistics."""
        blocks = self.cut(network)
        with evaluating(network):
            step = self(network, x, y)
            exact = mean_loss(self.loss, network(x), y)
        owned = {k: segment.parameters for k, segment in enumerate(blocks.segments, 1)}
        cosines = gradient_cosines(step.loss, exact, owned)
        return {k: replace(report, cosine=cosines.get(k)) for k, report in step.nodes.items()}

    def readouts(self, network: Any) -> list[Readout]:
        """The readouts that the rule trains: the chain."""
        return network.readouts[:1]

    def layout(self, network: nn.Module) -> Layout:
        """The blocks by their numbers, in the order in which the forward pass reaches them."""
        blocks = self.cut(network)
        named = {
            f"node {k}": nn.Sequential(*(part.module for part in s.parts)) for k, s in enumerate(blocks.segments, 1)
        }
        return Layout("loop", named | {"the head": blocks.head.module}, range(1, len(blocks.segments) + 1))


def detached_pass(segments: Sequence[Segment], x: Tensor) -> list[Tensor]:
    """Each block's output on the one before's, with the graph of that block alone."""
    outputs = []
    for segment in segments:
        x = segment(x)
        outputs.append(x)
        x = x.detach()
    return outputs


def local_cost(segments: Sequence[Segment], beside: Sequence[int] | None = None) -> tuple[int, int]:
    """Work and span of a pass through detached blocks, each of which walks back as soon as its own output is there.

    Args:
        beside: evaluations, one after the other, of what learns with each block between its output and its loss.
    """
    after = [0] * len(segments) if beside is None else beside
    work = sum(segment.cost + segment.backward_work + 3 * own for segment, own in zip(segments, after, strict=True))
    arrivals = accumulate(segment.cost for segment in segments)
    ways = zip(arrivals, after, segments, strict=True)
    return work, max(arrived + 2 * own + segment.backward_span for arrived, own, segment in ways)
