"""Direct feedback alignment (DFA): Nøkland, arXiv 1609.01596."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hbll.losses import Loss, cross_entropy
from hbll.network import Chain
from hbll.rule import StageLoss, Step, attach_gradients
from hbll.rules.local import Labels, LocalRule, detached

__all__ = ["DirectFeedbackAlignment"]


class DirectFeedbackAlignment(LocalRule):
    """The output's error reaches every stage's output through a fixed random matrix; inside a stage gradients are exact.

    Published: MNIST, fully connected layers with dropout 1.45 % error. No stage waits for another one's backward pass, but
    all of them wait for the output, and their graphs with them. Where every token has a label its own error reaches it.

    Args:
        network, stage, loss: as of ``LocalRule``.
    """

    shares: ClassVar[bool] = False
    by_itself: ClassVar[bool] = False

    def __init__(self, network: Chain, *, stage: int | Sequence[int] = 1, loss: Loss = cross_entropy) -> None:
        super().__init__(network, stage=stage, loss=loss)
        self.expect(0)

    def made(self, shapes: Sequence[torch.Size], classes: int) -> Sequence[Sequence[nn.Module]]:
        return [[Feedback(classes, math.prod(shape))] for shape in shapes]

    def losses(self, x: Any, y: Any, step: Step) -> Iterator[StageLoss]:
        self.build(x)
        labels, costs = Labels(y, self.label_dims), self.costs()
        if not len(labels):
            yield self.nothing(y, step)
            return
        step.count(self.local_cost()[0], sum(cost.forward for cost in costs) + max(cost.back for cost in costs))
        state, context = self.network.embedded(x)
        outputs = []
        for stage in self.stages:
            outputs.append(stage(state, **context))
            labels.check(outputs[-1])
            state, context = outputs[-1].detach(), detached(context)
        logits = self.logits(state, context)
        if not logits.requires_grad:  # of a head without trained parameters
            logits.requires_grad_()
        value = self.label_loss(logits, y, step)
        (error,) = torch.autograd.grad(value, logits, retain_graph=True)
        step.report([len(outputs)], error=value.unsqueeze(0))
        found = [StageLoss(len(outputs), value)]
        del logits, value
        yield found.pop()
        for k in range(len(outputs), 0, -1):
            (feedback,) = self.auxiliary(k)
            yield StageLoss(k, feedback(error, outputs.pop()))


class Feedback(nn.Module):
    """A fixed random matrix (classes, units), uniform between -1 / sqrt(units) and 1 / sqrt(units)."""

    matrix: Tensor

    def __init__(self, classes: int, units: int) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.empty(classes, units).uniform_(-1, 1) / math.sqrt(units))

    def forward(self, error: Tensor, output: Tensor) -> Tensor:
        """A scalar, 0, whose gradient in an output (B, ..., units) is the error (B, ..., classes) fed back to it."""
        gradient = (error.to(self.matrix) @ self.matrix).view_as(output)
        return attach_gradients(error.new_zeros(()), [output], [gradient])
