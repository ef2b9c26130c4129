"""Trials that are to bring stream closer to backpropagation, as one more rule for benchmarks/full_depth.py.

    python benchmarks/ideas.py characters --arms "trial (3,4) copies readout_depth=2 remainder=1" --optimizer muon

``trial`` is stream in two stages with copies, whose options are said at its class, all off at first and to be put together
at will. The command line is that of full_depth.py; a task's embed may make no context.

Some need traffic back, for which nothing waits: at step t stage 2 works on the batch of step t - 1, and what it found is
with stage 1 at step t + 1, two steps after stage 1 had that batch. Stage 1 has kept what it needs of it until then. For
gradients that are scaled, as for float16 or an accumulation, the trials are not made.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import full_depth
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import hbll
from hbll.carry import Carry
from hbll.losses import mean_loss
from hbll.rule import StageLoss, Step, attach_gradients
from hbll.rules import RULES
from hbll.rules.stream import Stream

FADING, RIDGE = 0.98, 1e-3
"""Of the regression: what is left of its sums after a step, and the ridge in terms of a feature's mean square."""


class Trial(Stream):
    """Stream in two stages, and what may bring it closer to backpropagation.

    Args:
        network: the network to train; its embed makes no context.
        soft: weight of KL(late || readout) in the loss of stage 1's readout alone: of the chain's own predictions for a
            batch, which come late, on the output of stage 1 that made them.
        match: weight of ||r - g||^2 / ||g||^2 in the loss of the readout alone: r is its gradient in such an output, g the
            true one, which comes late.
        remainder: share of g - r, r (or its estimate) as it was in time, that is walked back through stage 1 as soon as g is
            there, by the weights of that day. With 1 every batch moves stage 1 by its true gradient: what of it the
            readout foresaw in time, and the rest two steps late.
        fitted: whether stage 1 is walked back from the true gradient as [r, c s] W estimates it, s the outputs, normed,
            and c the size of r; W by ridge regression on the gradients that came late.
        readout_rate: learning rate of the readout, in terms of all others'.
        exact_from: the step, from 0, from which on there is backpropagation, with the optimizer as it stands; the batch
            between the stages is dropped then.
        options: as of ``Stream``.

    Raises:
        ValueError: there are not two stages with a readout of the first one's own, or it is refreshed.
    """

    def __init__(
        self,
        network: hbll.Chain,
        *,
        soft: float = 0.0,
        match: float = 0.0,
        remainder: float = 0.0,
        fitted: bool = False,
        readout_rate: float = 1.0,
        exact_from: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(network, **options)
        if len(self.own_readouts) != 1 or self.refresh:
            raise ValueError(
                "the trial is of two stages with copies that are not refreshed: say stage=(3,4), copies=True"
            )
        self.soft, self.match, self.remainder = soft, match, remainder
        self.fitted = fitted
        self.readout_rate = readout_rate
        self.exact_from = exact_from
        self.kept = Carry()
        """``steps`` so far; ``sent``, what stage 1 handed on in the last one, and ``back``, what stage 2 made of what it was
        handed then; ``readout``, its weights as they were before the last update; ``moments`` of the regression."""

    def losses(self, x: Any, y: Any, step: Step) -> Iterator[StageLoss]:
        kept = self.kept.on(next(self.parameters()).device) or {"steps": 0}
        if self.exact_from is not None and kept["steps"] >= self.exact_from:
            yield self._exact(x, y, step)
            left = {}
        elif step.look or not self.training:
            yield from super().losses(x, y, step)
            return
        else:
            left = yield from self._streamed(x, y, kept, step)
        self.kept.leave({"steps": kept["steps"] + 1, **left})

    def _exact(self, x: Any, y: Any, step: Step) -> StageLoss:
        blocks = len(self.network.blocks)
        step.count(3 * blocks, 2 * blocks)
        return StageLoss((1, 2), mean_loss(self.loss, self.network(x), y))

    def _streamed(self, x: Any, y: Any, kept: dict[str, Any], step: Step) -> Iterator[StageLoss]:
        """A step of stream, and what is tried beside it; returns what is kept of it."""
        (first, second), (readout,) = self.stages, self.own_readouts
        before, passed, after = len(first.blocks), len(readout.blocks), len(second.blocks)
        if "readout" in kept:
            with torch.no_grad():
                for weight, old in zip(readout.parameters(), kept["readout"], strict=True):
                    weight.add_(weight - old, alpha=self.readout_rate - 1)
        left: dict[str, Any] = {"readout": [weight.detach().clone() for weight in readout.parameters()]}

        output = first(self.network.embed(x))
        state = output.detach().requires_grad_()
        yield StageLoss(1, mean_loss(self.loss, readout(state), y), leaves=(state,))
        foreseen = read = state.grad
        if self.fitted and "back" in kept:
            left["moments"] = moments = _moments(kept.get("moments"), **kept["back"])
            foreseen = _estimate(moments, read, output.detach())
        yield _walk(output, foreseen)
        step.count(3 * (before + passed), 2 * (before + passed))
        left["sent"] = {"x": x, "y": y, "state": output.detach(), "read": read, "foreseen": foreseen}
        if "back" in kept:
            yield from self._late(step, **kept["back"])

        if "sent" in kept:
            sent = kept["sent"]
            state = sent["state"].detach().requires_grad_()
            logits = self.network.head(second(state))
            value = mean_loss(self.loss, logits, sent["y"])
            step.label_loss = value.detach()
            yield StageLoss(2, value, leaves=(state,))
            # Without traffic back nobody wants the gradient in what was handed on.
            step.count(3 * after - (not (self.match or self.remainder or self.fitted)), 2 * after)
            left["back"] = {**sent, "state": state.detach(), "logits": logits.detach(), "true": state.grad}
        return left

    def _late(
        self,
        step: Step,
        *,
        x: Tensor,
        y: Tensor,
        state: Tensor,
        foreseen: Tensor,
        logits: Tensor,
        true: Tensor,
        **_: Any,
    ) -> Iterator[StageLoss]:
        """What a batch teaches stage 1 once the chain's predictions for it and the true gradient are there."""
        first, (readout,) = self.stages[0], self.own_readouts
        before, passed = len(first.blocks), len(readout.blocks)
        if self.soft:
            pairs = (scores.flatten(0, -2).log_softmax(-1) for scores in (readout(state), logits))
            yield StageLoss(1, self.soft * F.kl_div(*pairs, reduction="batchmean", log_target=True))
            step.count(3 * passed - 1, 2 * passed)
        if self.match:
            state = state.detach().requires_grad_()
            with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
                value = mean_loss(self.loss, readout(state), y)
                (found,) = torch.autograd.grad(value, state, create_graph=True)
            distance = (found - true).square().sum() / true.square().sum()
            weights = [*readout.parameters()]
            gradients = torch.autograd.grad(self.match * distance, weights, materialize_grads=True)
            yield StageLoss(1, attach_gradients(self.match * distance, weights, gradients))
            step.count(6 * passed, 4 * passed)  # there and back, and back through both
        if self.remainder:
            yield _walk(first(self.network.embed(x)), self.remainder * (true - foreseen))
            step.count(3 * before, 2 * before)

    @property
    def in_flight(self) -> bool:
        return super().in_flight or "sent" in (self.kept.nest or {})

    def carries(self) -> Mapping[str, Carry]:
        return {**super().carries(), "trial": self.kept}


def _walk(output: Tensor, gradient: Tensor) -> StageLoss:
    """Walks stage 1 back from a gradient in its output."""
    return StageLoss(1, attach_gradients(output.new_zeros(()), [output], [gradient]))


def _features(read: Tensor, state: Tensor) -> Tensor:
    """What the true gradient is estimated by: (B, ..., F) each to (tokens, 2 F), in float64."""
    normed = F.layer_norm(state, state.shape[-1:]) * read.square().mean().sqrt()
    return torch.cat([read, normed], -1).flatten(0, -2).double()


def _moments(before: tuple[Tensor, Tensor] | None, *, read: Tensor, state: Tensor, true: Tensor, **_: Any) -> Any:
    """Running sums X^T X and X^T Y of features and true gradients."""
    features = _features(read, state)
    found = features.mT @ features, features.mT @ true.flatten(0, -2).double()
    return found if before is None else tuple(FADING * old + new for old, new in zip(before, found, strict=True))


def _estimate(moments: tuple[Tensor, Tensor], read: Tensor, state: Tensor) -> Tensor:
    """The true gradient by ridge regression, in the form of what was read."""
    squares, products = moments
    ridge = RIDGE * squares.diagonal().mean() * torch.eye(len(squares)).to(squares)
    found = _features(read, state) @ torch.linalg.solve(squares + ridge, products)
    return found.view_as(read).to(read.dtype)


if __name__ in ("__main__", "__mp_main__"):  # that of workers
    RULES["trial"] = Trial

if __name__ == "__main__":
    full_depth.main()
