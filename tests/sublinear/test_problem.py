import math

import numpy as np
import pytest
from scipy import stats

from hbll.sublinear.problem import settle, unit_rows


def test_threshold_and_share(make_problem):
    problem = make_problem(width=1000, kappa=0.3)
    assert problem.threshold == pytest.approx(math.sqrt(0.6 * math.log(1000)), rel=1e-15)
    assert problem.share == pytest.approx(stats.norm.sf(problem.threshold), rel=1e-12)


def test_the_threshold_is_rounded_once(make_problem):
    problem = make_problem(dtype="float32")
    assert problem.threshold == float(np.float32(problem.threshold))
    assert problem.exact.low < problem.threshold < problem.exact.high
    assert problem.exact.low.dtype == problem.points.dtype == problem.gram.dtype == np.float32


def test_a_width_of_one_has_no_threshold(make_problem):
    assert make_problem(width=1).threshold == 0


def test_settle_is_the_comparison_in_float64(make_problem, oracle):
    problem = make_problem(n=6, d=4, width=50)
    truth = oracle(problem)
    step = np.linspace(-3, 3, 6)
    points = np.arange(6, dtype=np.uint16)
    for neuron in range(50):
        sign = int(truth.signs[neuron])
        weights = truth.weights[neuron] - sign * step @ truth.points / math.sqrt(50)
        for j in range(6):
            expected = weights @ truth.points[j] > problem.threshold
            assert settle(problem.exact, neuron, sign, j, points, step, 0, 6) == expected


def test_a_tie_does_not_fire(make_problem, oracle, with_threshold):
    problem = make_problem(n=3, d=4, width=8)
    truth = oracle(problem)
    z = 0.0
    for k in range(4):  # the order in which settle adds
        z += truth.weights[5, k] * truth.points[2, k]
    none = np.empty(0, np.uint16), np.empty(0)
    assert not settle(with_threshold(problem, z).exact, 5, 1, 2, *none, 0, 0)
    assert settle(with_threshold(problem, np.nextafter(z, -1)).exact, 5, 1, 2, *none, 0, 0)


def test_rows_are_scaled_to_unit_norm_whatever_their_size():
    rows = unit_rows([[3, 4], [1e-300, 0], [1e300, 1e300]], "X")
    np.testing.assert_allclose(rows, [[0.6, 0.8], [1, 0], [math.sqrt(0.5)] * 2], rtol=1e-15)


@pytest.mark.parametrize(
    ("points", "sentence"),
    [
        (np.zeros(3), "shape"),
        (np.zeros((0, 3)), "shape"),
        (np.zeros((3, 0)), "shape"),
        ([[1, 2], [np.nan, 1]], "NaN or infinity, first in row 1"),
        ([[1, 2], [0, 0]], "row 1 of X has zero norm"),
    ],
)
def test_bad_points_are_refused(points, sentence):
    with pytest.raises(ValueError, match=sentence):
        unit_rows(points, "X")
