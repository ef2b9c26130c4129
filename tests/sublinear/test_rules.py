import numpy as np
import pytest

from hbll.sublinear.dense import Dense
from hbll.sublinear.pairs import tally
from hbll.sublinear.rules import GaussNewton, GradientDescent, LevenbergMarquardt, make_rule
from hbll.sublinear.solvers import System


@pytest.fixture
def system(make_problem):
    problem = make_problem(n=10, d=6, width=600)
    engine = Dense(problem)
    fired = engine.fired()
    return System(problem, fired, tally(fired, engine.signs, problem, with_shared=True))


def test_names(system):
    assert type(make_rule("gauss-newton", "cholesky", 0.0)) is GaussNewton
    assert type(make_rule("levenberg-marquardt", "cholesky", 0.0)) is LevenbergMarquardt
    assert type(make_rule("gradient-descent", "cholesky", 0.0)) is GradientDescent


@pytest.mark.parametrize("solver", ["cholesky", "sketch"])
def test_gauss_newton_adds_the_ridge_in_units_of_the_mean_diagonal(system, solver):
    residual, gram = np.linspace(-1, 1, 10), system.gram
    step = GaussNewton(solver, 0.5).step(system, residual)
    expected = np.linalg.solve(gram + 0.5 * np.trace(gram) / 10 * np.eye(10), residual)
    np.testing.assert_allclose(step, expected, rtol=1e-8)


def test_the_sketch_never_asks_for_the_gram_matrix():
    assert not GaussNewton("sketch", 0.0).wants_gram()
    assert GaussNewton("cholesky", 0.0).wants_gram()


def test_gradient_descent_takes_the_rate_of_the_start(system):
    rule, residual = GradientDescent(), np.linspace(-1, 1, 10)
    assert rule.wants_gram()
    expected = residual / np.linalg.norm(system.gram, 2)
    np.testing.assert_allclose(rule.step(system, residual), expected, rtol=1e-12)
    assert not rule.wants_gram()
    np.testing.assert_allclose(rule.step(system, 2 * residual), 2 * expected, rtol=1e-12)


def test_damping_follows_the_foretold_loss(system):
    rule, residual, gram = LevenbergMarquardt("cholesky", 0.0), np.linspace(-1, 1, 10), system.gram
    step = rule.step(system, residual)
    left = residual - gram @ step
    assert rule.foretold == pytest.approx(0.5 * left @ left, rel=1e-6)
    before = 0.5 * residual @ residual
    first = rule.damping
    assert rule.accept(before, rule.foretold)  # as foretold: the least allowed factor of Nielsen's rule, 1/3
    assert rule.next == pytest.approx(first / 3)
    rule.step(system, residual)
    assert rule.accept(before, (before + rule.foretold) / 2)  # half of what was foretold: unchanged
    assert rule.next == pytest.approx(first / 3)
    for factor in (2, 4, 8):  # undone: faster and faster growth
        rule.step(system, residual)
        last = rule.damping
        assert not rule.accept(before, 2 * before)
        assert rule.next == pytest.approx(factor * last)


def test_damping_that_has_no_end_ends(system):
    rule, residual = LevenbergMarquardt("cholesky", 0.0), np.ones(10)
    for _ in range(40):
        if rule.exhausted():
            break
        rule.step(system, residual)
        rule.accept(1.0, float("nan"))
    assert rule.exhausted()
