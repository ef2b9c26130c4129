"""Arc inversion. Oracles: the closed-form posterior of linear-Gaussian arcs and dense solves, in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hbll.inversion import conjugate_gradients, gauss_newton, taylor

SEEDS = st.integers(0, 10_000)
WIDTH, BATCH, NODES = 6, 5, 3


def normal(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def posterior_mean(weight, prior, target, variance):
    """Mean of z given z ~ N(prior, v I) and target ~ N(W z, v I); v cancels as both are alike."""
    width = weight.shape[1]
    precision = (torch.eye(width, dtype=torch.float64) + weight.T @ weight) / variance
    information = (prior + target @ weight) / variance
    return torch.linalg.solve(precision, information.T).T


def arc_gradient(weight, prior, target, variance):
    leaf = prior.clone().requires_grad_()
    error = (leaf @ weight.T - target).square().sum() / (2 * variance)
    return torch.autograd.grad(error, leaf)[0]


@given(SEEDS, st.floats(0.1, 10))
def test_taylor_at_step_one_half_is_exact_for_orthogonal_arcs(seed, variance):
    weight = torch.linalg.qr(normal(seed, WIDTH, WIDTH)).Q
    prior, target = normal(seed + 1, BATCH, WIDTH), normal(seed + 2, BATCH, WIDTH)
    gradient = arc_gradient(weight, prior, target, variance)
    actual = prior + variance * taylor(gradient, 0.5)
    torch.testing.assert_close(actual, posterior_mean(weight, prior, target, variance))


@given(SEEDS)
def test_taylor_at_step_one_half_is_the_papers_quarter(seed):
    weight, prior, target = normal(seed, WIDTH, WIDTH), normal(seed + 1, BATCH, WIDTH), normal(seed + 2, BATCH, WIDTH)
    leaf = prior.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((leaf @ weight.T - target).square().sum(), leaf)
    torch.testing.assert_close(taylor(arc_gradient(weight, prior, target, 1.0), 0.5), -0.25 * gradient)


def test_taylor_is_not_exact_for_other_arcs():
    weight, prior, target = normal(0, WIDTH, WIDTH), normal(1, BATCH, WIDTH), normal(2, BATCH, WIDTH)
    actual = prior + taylor(arc_gradient(weight, prior, target, 1.0), 0.5)
    assert (actual - posterior_mean(weight, prior, target, 1.0)).norm() > 0.1


@settings(max_examples=30)
@given(SEEDS)
def test_conjugate_gradients_solve_every_system_of_a_batch(seed):
    roots = normal(seed, NODES, BATCH, WIDTH, WIDTH)
    matrices = roots @ roots.mT + torch.eye(WIDTH, dtype=torch.float64)
    right = normal(seed + 1, NODES, BATCH, WIDTH)
    right[0, 0] = 0.0  # solved before it starts
    solution = conjugate_gradients(lambda u: (matrices @ u.unsqueeze(-1)).squeeze(-1), right, 2 * WIDTH, batch_dims=2)
    torch.testing.assert_close(solution, torch.linalg.solve(matrices, right))
    assert (solution[0, 0] == 0).all()


def test_conjugate_gradients_treat_unknowns_of_any_shape():
    scale = normal(0, 2, 3, 4, 5).exp()
    right = normal(1, 2, 3, 4, 5)
    solution = conjugate_gradients(lambda u: scale * u, right, 40, batch_dims=2)
    torch.testing.assert_close(solution, right / scale)


def test_conjugate_gradients_lower_the_error_from_zero_on():
    root = normal(0, 1, 1, WIDTH, WIDTH)
    matrix = root @ root.mT + torch.eye(WIDTH, dtype=torch.float64)
    right = normal(1, 1, 1, WIDTH)
    exact = torch.linalg.solve(matrix, right)

    def energy(iterations):
        error = conjugate_gradients(lambda u: (matrix @ u.unsqueeze(-1)).squeeze(-1), right, iterations, 2) - exact
        return (error.unsqueeze(-2) @ matrix @ error.unsqueeze(-1)).item()

    energies = [energy(k) for k in range(WIDTH + 1)]
    assert energies == sorted(energies, reverse=True)
    assert energies[-1] < 1e-20 * energies[0]


@settings(max_examples=30)
@given(SEEDS, st.floats(0.2, 5))
def test_gauss_newton_is_the_posterior_mean_of_linear_arcs(seed, variance):
    weight = normal(seed, NODES, WIDTH, WIDTH)
    prior, target = normal(seed + 1, NODES, BATCH, WIDTH), normal(seed + 2, NODES, BATCH, WIDTH)
    mean = prior.clone().requires_grad_()
    prediction = mean @ weight.mT

    def error_gradient(prediction):
        return (prediction - target) / variance

    (gradient,) = torch.autograd.grad(prediction, mean, error_gradient(prediction).detach(), retain_graph=True)
    delta = gauss_newton(mean, prediction, gradient, error_gradient, variance, iterations=2 * WIDTH)
    for n in range(NODES):
        expected = posterior_mean(weight[n], prior[n], target[n], variance)
        torch.testing.assert_close(prior[n] + delta[n], expected, rtol=1e-7, atol=1e-7)


def test_gauss_newton_linearises_a_nonlinear_arc():
    variance, weight = 0.8, normal(0, WIDTH, WIDTH)
    prior, target = normal(1, 1, BATCH, WIDTH), normal(2, 1, BATCH, WIDTH)
    mean = prior.clone().requires_grad_()
    prediction = torch.tanh(mean @ weight.T)

    def error_gradient(prediction):
        return (prediction - target) / variance

    (gradient,) = torch.autograd.grad(prediction, mean, error_gradient(prediction).detach(), retain_graph=True)
    delta = gauss_newton(mean, prediction, gradient, error_gradient, variance, iterations=3 * WIDTH)
    for b in range(BATCH):
        jacobian = torch.autograd.functional.jacobian(lambda z: torch.tanh(weight @ z), prior[0, b])
        matrix = (torch.eye(WIDTH, dtype=torch.float64) + jacobian.T @ jacobian) / variance
        right = jacobian.T @ (target[0, b] - torch.tanh(weight @ prior[0, b])) / variance
        torch.testing.assert_close(delta[0, b], torch.linalg.solve(matrix, right))


def test_gauss_newton_at_the_label_uses_the_fisher_matrix_of_each_sample():
    variance, classes = 1.7, 4
    weight, prior = normal(0, classes, WIDTH), normal(1, 1, BATCH, WIDTH)
    y = torch.arange(BATCH) % classes
    mean = prior.clone().requires_grad_()
    logits = (mean @ weight.T)[0]

    def error_gradient(logits):
        return torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), logits, create_graph=True)[0]

    (gradient,) = torch.autograd.grad(logits, mean, error_gradient(logits).detach(), retain_graph=True)
    delta = gauss_newton(mean, logits, gradient, error_gradient, variance, iterations=3 * WIDTH)
    for b in range(BATCH):
        p = (weight @ prior[0, b]).softmax(0)
        fisher = torch.diag(p) - torch.outer(p, p)
        matrix = torch.eye(WIDTH, dtype=torch.float64) / variance + weight.T @ fisher @ weight
        right = -weight.T @ (p - F.one_hot(y[b], classes))
        torch.testing.assert_close(delta[0, b], torch.linalg.solve(matrix, right))


def energy(weight, prior, target, state):
    return ((state - prior).square().sum(-1) + (state @ weight.T - target).square().sum(-1)) / 2


@pytest.mark.parametrize(("width", "at_least"), [(8, 1), (32, 10), (128, 20)])
def test_step_one_half_overshoots_residual_arcs(width, at_least):
    # Specification, section 2: with I + 0.3 randn the objective rises, at widths 32 and 128 in every draw.
    rises = 0
    for seed in range(20):
        weight = torch.eye(width, dtype=torch.float64) + 0.3 * normal(seed, width, width)
        prior, target = normal(seed + 100, 1, width), normal(seed + 200, 1, width)
        state = prior + taylor(arc_gradient(weight, prior, target, 1.0), 0.5)
        rises += (energy(weight, prior, target, state) > energy(weight, prior, target, prior)).item()
    assert rises >= at_least


@given(SEEDS, st.floats(0.01, 0.999), st.floats(0.05, 3))
def test_steps_below_the_bound_lower_the_energy(seed, share, scale):
    weight = torch.eye(WIDTH, dtype=torch.float64) + scale * normal(seed, WIDTH, WIDTH)
    prior, target = normal(seed + 1, BATCH, WIDTH), normal(seed + 2, BATCH, WIDTH)
    bound = 2 / (1 + torch.linalg.matrix_norm(weight, 2).item() ** 2)
    state = prior + taylor(arc_gradient(weight, prior, target, 1.0), share * bound)
    assert (energy(weight, prior, target, state) < energy(weight, prior, target, prior)).all()


def test_the_bound_is_tight():
    # Along the leading singular direction any longer step raises the energy.
    weight = torch.eye(WIDTH, dtype=torch.float64) + normal(0, WIDTH, WIDTH)
    left, values, right = torch.linalg.svd(weight)
    prior = torch.zeros(1, WIDTH, dtype=torch.float64)
    target = left[:, 0].unsqueeze(0)
    gradient = arc_gradient(weight, prior, target, 1.0)
    bound = 2 / (1 + values[0].item() ** 2)
    before = energy(weight, prior, target, prior)
    assert energy(weight, prior, target, prior + taylor(gradient, 0.99 * bound)) < before
    assert energy(weight, prior, target, prior + taylor(gradient, 1.01 * bound)) > before
    torch.testing.assert_close(gradient / gradient.norm(), -right[:1])
