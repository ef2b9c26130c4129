import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hbll.sublinear.coefficients import add_step, shift_rows
from hbll.sublinear.pairs import Pairs

masks = hnp.arrays(bool, st.tuples(st.integers(1, 6), st.just(5)))


def pairs_of(mask, values):
    counts = mask.sum(axis=1)
    starts = np.concatenate([[0], np.cumsum(counts)])
    return Pairs(starts, np.nonzero(mask)[1].astype(np.uint16), values[mask])


@given(masks, st.integers(0, 2**32 - 1))
def test_add_step_is_the_sum_of_the_matrices(mask, seed):
    rng = np.random.default_rng(seed)
    fires = rng.random(mask.shape) < 0.4
    before, step = rng.standard_normal(mask.shape), rng.standard_normal(5)
    total = add_step(pairs_of(mask, before), pairs_of(fires, np.ones(mask.shape)), step)
    expected = before * mask + step * fires
    np.testing.assert_array_equal(np.diff(total.starts), (mask | fires).sum(axis=1))
    np.testing.assert_array_equal(total.points, np.nonzero(mask | fires)[1])
    np.testing.assert_array_equal(total.values, expected[mask | fires])


def test_shift_rows_moves_the_weights():
    rng = np.random.default_rng(0)
    mask, values = rng.random((7, 5)) < 0.5, rng.standard_normal((7, 5))
    points, signs = rng.standard_normal((5, 3)), np.array([1, -1, 1, -1], np.int8)
    before = rng.standard_normal((4, 3))
    for step in (np.empty(0), rng.standard_normal(5)):
        weights = before.copy()
        shift_rows(pairs_of(mask, values), 2, step, signs, 0.25, points, weights)
        factor = (values if not len(step) else step) * mask
        expected = before - 0.25 * signs[:, None] * (factor[2:6] @ points)
        np.testing.assert_allclose(weights, expected, atol=1e-14)
