import math

import numpy as np
import pytest

from hbll.sublinear.screen import screen


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_only_the_neurons_that_fire_are_kept_with_all_they_could_fire_on(make_problem, oracle, dense_matrix, dtype):
    problem = make_problem(n=20, width=1000, kappa=0.3, dtype=dtype)
    truth = oracle(problem)
    reach = np.linspace(0.1, 0.5, 20)
    result = screen(problem, reach)
    alive = truth.fires.any(axis=1)
    np.testing.assert_array_equal(result.neurons, np.flatnonzero(alive))
    np.testing.assert_array_equal(result.signs, truth.signs[alive])
    np.testing.assert_allclose(result.slack, np.sqrt(truth.fires[alive] @ reach**2), rtol=1e-6)
    listed = dense_matrix(result.lists, 20, values=False)
    np.testing.assert_array_equal(listed, truth.z[alive] > problem.threshold - result.slack[:, None])
    np.testing.assert_allclose(dense_matrix(result.lists, 20)[listed], truth.z[alive][listed], atol=1e-5)


def test_without_reach_the_lists_are_the_pairs_that_fire(make_problem, oracle, dense_matrix):
    problem = make_problem(n=20, width=500)
    truth = oracle(problem)
    result = screen(problem, np.zeros(20))
    np.testing.assert_array_equal(dense_matrix(result.lists, 20, values=False), truth.fires[truth.fires.any(axis=1)])


def test_the_first_neurons_only(make_problem):
    problem = make_problem(width=500)
    whole, part = screen(problem, np.zeros(12)), screen(problem, np.zeros(12), width=100)
    np.testing.assert_array_equal(part.neurons, whole.neurons[whole.neurons < 100])


def test_a_tie_is_alike_for_coinciding_points(make_problem, oracle, with_threshold):
    problem = make_problem(n=9, d=4, width=40, copies=4)
    truth = oracle(problem)
    z = 0.0
    for k in range(4):
        z += truth.weights[17, k] * truth.points[1, k]
    for threshold, fires in ((z, False), (math.nextafter(z, -1), True)):
        result = screen(with_threshold(problem, threshold), np.zeros(9))
        row = np.searchsorted(result.neurons, 17)
        found = row < len(result.neurons) and result.neurons[row] == 17
        points = result.lists.points[slice(*result.lists.starts[row : row + 2])] if found else []
        assert (1 in points) == (6 in points) == fires
