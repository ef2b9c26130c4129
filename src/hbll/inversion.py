"""Arc inversion: which value of a node would explain what its right neighbour holds?

A node with the prior N(a, sigma^2 I) sees, through its right arc, an error E(z), a negative log-likelihood. Its posterior
is approximated by a Gaussian whose mean is a + correction. Two ways to the correction are here: one gradient step (the
paper's first-order Taylor expansion) and the exact solution for the linearised arc (arXiv 2606.21497, section 3;
conjugate gradients on the Gauss-Newton normal equations). Both look at the Jacobian of the right arc alone.
"""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["conjugate_gradients", "gauss_newton", "taylor"]


def taylor(gradient: Tensor, step: float) -> Tensor:
    """The correction of the natural parameters, -step * gradient of the error in the mean.

    At step 1/2 it is exact when the arc is linear and orthogonal and both variances are equal; it lowers
    ||z - a||^2 / 2 + E(z) for a step below 2 / (1 + ||J||^2).
    """
    return -step * gradient


def conjugate_gradients(
    matvec: Callable[[Tensor], Tensor], right_side: Tensor, iterations: int, batch_dims: int
) -> Tensor:
    """Solves A x = b for many independent symmetric positive definite systems at once.

    Args:
        matvec: x -> A x, of the right side's shape.
        right_side: b, shape `(*batch, *unknowns)`.
        iterations: how many; the number of unknowns solves exactly up to rounding.
        batch_dims: how many leading dimensions number the systems.

    Returns:
        x after that many iterations from 0, of the right side's shape.
    """
    unknowns = tuple(range(batch_dims, right_side.ndim))

    def dot(u: Tensor, v: Tensor) -> Tensor:
        return (u * v).sum(unknowns, keepdim=True)

    # A system that is solved already has residual and direction 0: its 0 / 0 must be 0.
    tiny = torch.finfo(right_side.dtype).tiny
    solution = torch.zeros_like(right_side)
    residual = direction = right_side
    norm = dot(residual, residual)
    for _ in range(iterations):
        image = matvec(direction)
        rate = norm / dot(direction, image).clamp_min(tiny)
        solution = solution + rate * direction
        residual = residual - rate * image
        last, norm = norm, dot(residual, residual)
        direction = residual + norm / last.clamp_min(tiny) * direction
    return solution


def gauss_newton(
    mean: Tensor,
    prediction: Tensor,
    gradient: Tensor,
    error_gradient: Callable[[Tensor], Tensor],
    variance: float,
    iterations: int,
) -> Tensor:
    """The correction for the linearised arc: (I / sigma^2 + J^T H J) delta = -grad E.

    J is the Jacobian of the prediction in the mean and H the Hessian of the error in the prediction: I / sigma^2 between
    Gaussian states, the softmax Fisher matrix for cross-entropy at the label. With H = I / sigma^2 the correction is the
    exact posterior mean of a linear-Gaussian arc.

    Args:
        mean: a, shape (n, B, ...), a leaf that requires a gradient: n nodes with B samples each.
        prediction: what the right arc predicts from it, with its graph; any shape.
        gradient: each sample's own gradient of the error in the mean, of its shape.
        error_gradient: prediction -> gradient of each sample's own error in it, differentiable, same shape.
        variance: sigma^2 of the node's prior.
        iterations: conjugate-gradient iterations; each takes one product with J and one with its transpose.

    Returns:
        delta, the shape of ``mean``; n B independent systems.
    """
    # J u is the gradient of <J^T w, u> in w: reverse mode twice works for every module that autograd knows.
    cotangent = torch.zeros_like(prediction, requires_grad=True)
    (pulled_back,) = torch.autograd.grad(prediction, mean, cotangent, create_graph=True)
    logits = prediction.detach().requires_grad_()
    with torch.enable_grad():
        slope = error_gradient(logits)

    def matvec(u: Tensor) -> Tensor:
        (pushed_forward,) = torch.autograd.grad(pulled_back, cotangent, u, retain_graph=True)
        (curved,) = torch.autograd.grad(slope, logits, pushed_forward, retain_graph=True)
        return u / variance + torch.autograd.grad(prediction, mean, curved, retain_graph=True)[0]

    return conjugate_gradients(matvec, -gradient, iterations, batch_dims=2)
