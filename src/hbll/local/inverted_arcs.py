"""Target propagation by inverted arcs: block-local learning without a feedback network.

The last block's input would lower the label's loss if it moved; where to is the target of the block before, which that
block's own input would reach if it moved, and so on (Bengio, arXiv 1407.7906; Gauss-Newton targets: Meulemans et al., arXiv
2006.14331). Each arc is inverted by ``hbll.inversion``.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hbll.cuts import Segment
from hbll.families import Gaussian, product
from hbll.inversion import gauss_newton
from hbll.local.rule import Blocks, LocalStep
from hbll.losses import Loss, mean_loss

__all__ = ["inverted_step"]


def inverted_step(blocks: Blocks, x: Tensor, y: Tensor, loss: Loss, family: Gaussian, iterations: int) -> LocalStep:
    """A step in which block k moves to the posterior of its state given the target of block k + 1.

    The arcs are inverted one after the other, from the label back, once the forward pass is over. Samples must not see each
    other: with batch normalisation the targets are approximate.

    Args:
        family: of the states; its variance weighs how far targets may lie from them.
        iterations: conjugate-gradient iterations of each inversion.
    """
    inputs, outputs = [], []
    state = x
    for segment in blocks.segments:
        # A node dimension in front is what the inversion expects.
        inputs.append(state.detach().unsqueeze(0).requires_grad_(bool(outputs)))
        state = segment(inputs[-1][0])
        outputs.append(state)
    logits = blocks.head.module(state)
    losses = [mean_loss(loss, logits, y)]
    credit = {}
    prediction, error = logits, lambda logits: len(y) * mean_loss(loss, logits, y)
    for k in range(len(outputs) - 1, 0, -1):
        output, leaf = outputs[k - 1], inputs[k]
        credit[k] = error(prediction)
        (gradient,) = torch.autograd.grad(credit[k], leaf, retain_graph=True)
        correction = gauss_newton(leaf, prediction, gradient, _slope(error), family.variance, iterations)[0]
        prior = family.natural(output.flatten(1))
        posterior = product(prior, family.natural(correction.flatten(1))).detach()
        losses.append(family.kl(posterior, prior).mean())
        prediction, error = output, _distance(output.detach() + correction, family)
    return LocalStep(losses[::-1], *_cost(blocks.segments, iterations), credit=credit)


def _slope(error: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda prediction: torch.autograd.grad(error(prediction), prediction, create_graph=True)[0]


def _distance(target: Tensor, family: Gaussian) -> Callable[[Tensor], Tensor]:
    return lambda prediction: family.divergence(prediction.flatten(1), target.flatten(1)).sum()


def _cost(segments: Sequence[Segment], iterations: int) -> tuple[int, int]:
    """Work and span: an arc's gradient, then an iteration's product with its Jacobian and one with the transpose."""
    ready = sum(segment.cost for segment in segments)
    work, span = ready, 0
    for k, segment in reversed(list(enumerate(segments))):
        work += segment.backward_work
        span = max(span, ready + segment.backward_span)
        if k:
            work += (2 + 2 * iterations) * segment.cost
            ready += (1 + 2 * iterations) * segment.cost
    return work, span
