"""Target propagation by inverted arcs: block-local learning without a feedback network.

The last stage's input would lower the label's loss if it moved; where to is the target of the stage before, which that
stage's own input would reach if it moved, and so on (Bengio, arXiv 1407.7906; Gauss-Newton targets: Meulemans et al., arXiv
2006.14331). Each arc is inverted by ``hbll.inversion``.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hbll.families import Gaussian, product
from hbll.inversion import gauss_newton
from hbll.losses import mean_loss
from hbll.rule import StageLoss, Step
from hbll.rules.local import Labels, LocalRule, detached

__all__ = ["inverted_losses"]


def inverted_losses(
    rule: LocalRule, x: Any, y: Any, step: Step, family: Gaussian, iterations: int
) -> Iterator[StageLoss]:
    """The losses of a step in which stage k moves to the posterior of its state given the target of stage k + 1.

    The arcs are inverted one after the other, from the label back, once the forward pass is over, whose graphs wait for
    them. Samples must not see each other: with batch normalisation the targets are approximate.

    Args:
        rule: whose stages, head and loss they are.
        x, y, step: as of ``Rule.losses``.
        family: of the states; its variance weighs how far targets may lie from them.
        iterations: conjugate-gradient iterations of each inversion.
    """
    labels = Labels(y)
    if not len(labels):
        yield rule.nothing(y, step)
        return
    step.count(*_cost(rule, iterations))
    *before, last = rule.stages
    outputs, leaves = [], []
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        state, context = rule.network.embedded(x)
        for stage in before:
            outputs.append(stage(state, **context))
            labels.check(outputs[-1])
            # A node dimension in front is what the inversion expects.
            leaves.append(outputs[-1].detach().unsqueeze(0).requires_grad_())
            state, context = leaves[-1][0], detached(context)
        output = last(state, **context)
        labels.check(output)
        prediction = rule.logits(output, context)
    count = len(labels.classes)
    value = rule.label_loss(prediction, y, step)

    def error(logits: Tensor) -> Tensor:
        return count * mean_loss(rule.loss, logits, y)

    through: tuple[Tensor, ...] = ()
    for k in range(len(outputs), 0, -1):
        output, leaf = outputs.pop(), leaves.pop()
        credit = error(prediction)
        (gradient,) = torch.autograd.grad(credit, leaf, retain_graph=True)
        correction = gauss_newton(leaf, prediction, gradient, _slope(error), family.variance, iterations)[0]
        step.report([k + 1], error=value.unsqueeze(0))
        found = [StageLoss(k + 1, value, through=through)]
        prior = family.natural(output.flatten(1))
        posterior = product(prior, family.natural(correction.flatten(1))).detach()
        value = family.kl(posterior, prior).sum() / count
        prediction, error = output, _distance(output.detach() + correction, family)
        through = (credit,) if step.look else ()
        del credit
        yield found.pop()
    step.report([1], error=value.unsqueeze(0))
    yield StageLoss(1, value, through=through)


def _slope(error: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda prediction: torch.autograd.grad(error(prediction), prediction, create_graph=True)[0]


def _distance(target: Tensor, family: Gaussian) -> Callable[[Tensor], Tensor]:
    return lambda prediction: family.divergence(prediction.flatten(1), target.flatten(1)).sum()


def _cost(rule: LocalRule, iterations: int) -> tuple[int, int]:
    """Work and span: an arc's gradient, then an iteration's product with its Jacobian and one with the transpose."""
    costs = rule.costs()
    work = ready = sum(cost.forward for cost in costs)
    span = 0
    for k, cost in reversed(list(enumerate(costs))):
        work += cost.products
        span = max(span, ready + cost.back)
        if k:
            work += (2 + 2 * iterations) * cost.forward
            ready += (1 + 2 * iterations) * cost.forward
    return work, span
