import numpy as np
import pytest

from hbll.sublinear.dense import Dense
from hbll.sublinear.pairs import tally
from hbll.sublinear.solvers import System, cholesky, gram_times, sketched


@pytest.fixture
def system_of():
    def make(problem):
        engine = Dense(problem)
        fired = engine.fired()
        return System(problem, fired, tally(fired, engine.signs, problem, with_shared=True))

    return make


def test_the_gram_matrix_is_that_of_the_jacobian(make_problem, oracle, system_of):
    problem = make_problem(n=14, d=5, width=400)
    system, jacobian = system_of(problem), oracle(problem).jacobian()
    np.testing.assert_allclose(system.gram, jacobian @ jacobian.T, atol=1e-14)
    np.testing.assert_allclose(system.diagonal, np.diag(jacobian @ jacobian.T), atol=1e-14)
    vector = np.linspace(-1, 1, 14)
    np.testing.assert_allclose(gram_times(system, vector), jacobian @ (jacobian.T @ vector), atol=1e-13)


@pytest.mark.parametrize("solve", [cholesky, sketched])
@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_solvers_solve(make_problem, oracle, system_of, solve, ridge):
    problem = make_problem(n=30, d=8, width=2000)
    jacobian = oracle(problem).jacobian()
    residual = np.random.default_rng(0).standard_normal(30)
    expected = np.linalg.solve(jacobian @ jacobian.T + ridge * np.eye(30), residual)
    np.testing.assert_allclose(solve(system_of(problem), residual, ridge), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("solve", [cholesky, sketched])
def test_a_point_on_which_nothing_fires_is_named(make_problem, with_threshold, oracle, system_of, solve):
    problem = make_problem(n=5, d=3, width=30)
    highest = oracle(problem).z.max(axis=0)
    problem = with_threshold(problem, float(highest.min()) + 1e-6)
    dark = int(highest.argmin())
    with pytest.raises(ValueError, match=f"no neuron fires on point {dark} .*set a ridge"):
        solve(system_of(problem), np.ones(5), 0.0)
    assert np.isfinite(solve(system_of(problem), np.ones(5), 0.1)).all()


def test_coinciding_points_are_singular_without_a_ridge(make_problem, oracle, system_of):
    problem = make_problem(n=10, width=500, copies=2)
    with pytest.raises(ValueError, match="points coincide"):
        cholesky(system_of(problem), np.arange(10.0), 0.0)
    jacobian = oracle(problem).jacobian()
    expected = np.linalg.solve(jacobian @ jacobian.T + 0.2 * np.eye(10), np.arange(10.0))
    np.testing.assert_allclose(cholesky(system_of(problem), np.arange(10.0), 0.2), expected, rtol=1e-8)
