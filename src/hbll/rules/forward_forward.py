"""Forward-Forward (FF): Hinton, "The Forward-Forward algorithm", arXiv 2212.13345."""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hbll.calls import Readout
from hbll.losses import Loss, cross_entropy
from hbll.modes import still_statistics, tracking_norms
from hbll.names import check_choice, check_number
from hbll.network import Chain
from hbll.rule import StageLoss, Step
from hbll.rules.features import by_pixel
from hbll.rules.local import Labels, LocalRule, detached

__all__ = ["ForwardForward", "goodness", "overlay", "unit_length"]


def overlay(x: Tensor, y: Tensor, classes: int) -> Tensor:
    """Inputs (B, ...) whose first ``classes`` entries are replaced by the one-hot label y, (B,) (section 3.3).

    Raises:
        ValueError: an input has fewer entries.
    """
    flat = x.flatten(1)
    if flat.shape[1] < classes:
        raise ValueError(f"the label takes the place of an input's first {classes} entries; it has {flat.shape[1]}")
    return torch.cat([F.one_hot(y, classes).to(x.dtype), flat[:, classes:]], 1).view_as(x)


def unit_length(state: Tensor) -> Tensor:
    """States scaled so that the mean square of a sample's entries is 1.

    A layer sees the direction of what the layer before it computed, and not its length, by which that layer was judged.
    """
    length = state.flatten(1).square().mean(1).sqrt().clamp_min(1e-8)
    return state / length.view(-1, *(1 for _ in state.shape[1:]))


def goodness(state: Tensor) -> Tensor:
    """Sum of the squared features, a mean over pixels or tokens: (B, ...) -> (B,)."""
    return by_pixel(state).square().sum(1).mean(1)


class ForwardForward(LocalRule):
    """Every stage tells inputs with their own label from the same inputs with a wrong one, by its output's goodness.

    Published: MNIST, 4 layers of 2000 ReLU 1.36 % error (1.45 in the public reimplementations). Stages see what comes to
    them at unit length. Two ways of reading: the chain, whose head learns from the last stage's output on inputs without a
    label (section 3.3's quick way), and ``goodness``, the label with the most of it in all stages but the first. It is
    meant for ReLU layers without skips: sigmoid layers cannot exceed the threshold.

    Args:
        network, stage, loss: as of ``LocalRule``; inputs are numbers, whose first entries the label takes the place of.
        threshold: of the goodness, per feature.
        contrast: both inputs are compared with the ``threshold`` (equation 1), or with each other (``symmetric``, SymBa:
            Lee & Song, arXiv 2303.08418).
    """

    shares: ClassVar[bool] = False
    by_itself: ClassVar[bool] = False

    def __init__(
        self,
        network: Chain,
        *,
        stage: int | Sequence[int] = 1,
        threshold: float = 1.0,
        contrast: Literal["threshold", "symmetric"] = "threshold",
        loss: Loss = cross_entropy,
    ) -> None:
        super().__init__(network, stage=stage, loss=loss)
        check_number("threshold", threshold)
        check_choice("contrast", contrast, ("threshold", "symmetric"))
        self.threshold = threshold
        self.contrast = contrast

    def losses(self, x: Any, y: Any, step: Step) -> Iterator[StageLoss]:
        if not (isinstance(x, Tensor) and x.is_floating_point()):
            got = x.dtype if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise ValueError(f"ff writes the label into the inputs, which must be floating-point numbers; got {got}")
        if isinstance(y, Tensor) and y.ndim > 1:
            raise ValueError(f"ff writes one label into each input: it takes labels (B,); got {tuple(y.shape)}")
        labels = Labels(y)
        labels.check(x)
        if not len(labels):
            yield self.nothing(y, step)
            return
        work, span = self.local_cost()
        step.count(2 * work + sum(cost.forward for cost in self.costs()), span)
        with torch.no_grad():
            state, context = self.network.embedded(x)
            for stage in self.stages:
                state = stage(state, **context)
        logits = self.logits(state, context)
        classes = logits.shape[-1]
        found = [StageLoss(len(self.stages), self.label_loss(logits, y, step))]
        del logits
        yield found.pop()
        own = labels.classes
        wrong = (own + torch.randint_like(own, 1, classes)) % classes
        shown = labels.rows(x)
        for k, output in self.unit_pass(torch.cat([overlay(shown, label, classes) for label in (own, wrong)])):
            value = self.contrasted(output)
            step.report([k], error=value.unsqueeze(0))
            found = [StageLoss(k, value)]
            del output, value
            yield found.pop()

    def unit_pass(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Each stage and its output on what comes to it, at unit length; with the graph of that stage alone."""
        with still_statistics(tracking_norms(self.network)):  # those of the chain are the ones to be deployed
            state, context = self.network.embedded(unit_length(x))
        for k, stage in enumerate(self.stages, 1):
            with still_statistics(tracking_norms(stage)):
                outputs = [(k, stage(state, **context))]
            state, context = unit_length(outputs[0][1].detach()), detached(context)
            yield outputs.pop()

    def contrasted(self, output: Tensor) -> Tensor:
        """The loss of a stage's output on inputs with their label, the first half, and on those with a wrong one."""
        right, wrong = goodness(output).chunk(2)
        if self.contrast == "symmetric":
            return F.softplus(wrong - right).mean()
        threshold = self.threshold * by_pixel(output).shape[1]
        return (F.softplus(threshold - right) + F.softplus(wrong - threshold)).mean()

    @torch.no_grad()
    def scores(self, x: Tensor) -> Tensor:
        """Of inputs (B, ...) under each label, (B, classes): their goodness, summed over all stages but the first."""
        classes = self.network(x[:1]).shape[-1]
        found = []
        for label in range(classes):
            labelled = overlay(x, torch.full(x.shape[:1], label, device=x.device), classes)
            judged = [goodness(output) for k, output in self.unit_pass(labelled) if k > 1 or len(self.stages) == 1]
            found.append(torch.stack(judged).sum(0))
        return torch.stack(found, 1)

    @property
    def readouts(self) -> list[Readout]:
        """The chain, and ``goodness``, whose blocks are evaluated once for every label."""
        (chain,) = super().readouts
        return [chain, Readout("goodness", chain.path, chain.blocks, self.scores)]
