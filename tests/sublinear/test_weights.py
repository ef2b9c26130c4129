import math

import numpy as np
import pytest
from scipy import stats

from hbll.sublinear.weights import DENSITY, EDGES, LAYER_AREA, TAIL_START, initial_rows, initial_signs

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)


def test_layers_of_the_ziggurat_have_one_area():
    heights = np.diff(DENSITY[1:])
    np.testing.assert_allclose(EDGES[1:-1] * heights, LAYER_AREA, rtol=1e-6)
    tail = math.sqrt(2 * math.pi) * stats.norm.sf(TAIL_START)
    assert TAIL_START * DENSITY[1] + tail == pytest.approx(LAYER_AREA, rel=1e-9)


def test_a_neuron_is_a_function_of_seed_and_number():
    rows = initial_rows(7, np.arange(100), 9, F32)
    some = np.array([99, 3, 50])
    np.testing.assert_array_equal(initial_rows(7, some, 9, F32), rows[some])
    np.testing.assert_array_equal(initial_signs(7, some), initial_signs(7, np.arange(100))[some])
    assert not np.any(initial_rows(8, some, 9, F32) == rows[some])


def test_the_same_network_in_both_data_types():
    neurons = np.array([0, 5, 2**40])
    np.testing.assert_array_equal(initial_rows(1, neurons, 6, F32).astype(F64), initial_rows(1, neurons, 6, F64))


def test_weights_are_standard_normal():
    sample = initial_rows(0, np.arange(20_000), 20, F64).ravel()
    assert stats.kstest(sample, "norm").pvalue > 1e-3
    error = 5 / math.sqrt(len(sample))
    assert abs(sample.mean()) < error
    assert abs((sample**2).mean() - 1) < error * math.sqrt(2)
    assert abs((sample**4).mean() - 3) < error * math.sqrt(96)
    for edge in (1.0, 2.5, TAIL_START, 4.0):
        expected = 2 * stats.norm.sf(edge) * len(sample)
        assert abs((np.abs(sample) > edge).sum() - expected) < 5 * math.sqrt(expected)


def test_neurons_and_features_are_uncorrelated():
    rows = initial_rows(3, np.arange(4000), 30, F64)
    product = rows.T @ rows / len(rows) - np.eye(30)
    assert np.abs(product).max() < 6 * math.sqrt(2 / len(rows))
    assert abs((rows[1:] * rows[:-1]).mean()) < 5 / math.sqrt(rows.size)


def test_signs_are_fair():
    signs = initial_signs(0, np.arange(10_000)).astype(int)
    assert set(signs) == {-1, 1}
    assert abs(signs.sum()) < 5 * 100
    assert abs((signs[1:] * signs[:-1]).sum()) < 5 * 100
