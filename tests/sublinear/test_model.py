import math

import numpy as np
import pytest

from hbll.sublinear import fit
from hbll.sublinear.weights import initial_rows, initial_signs


@pytest.fixture(scope="module")
def trained():
    rng = np.random.default_rng(0)
    X, Y = rng.standard_normal((20, 6)), rng.standard_normal((20, 2))
    return X, Y, fit(X, Y, 3000, 0.2, max_iter=2, dtype="float64", engine="slack")


def written_out(model, target, points):
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    neurons = np.arange(model.problem.width)
    z = model.weights(neurons, target) @ unit.T
    signs = initial_signs(model.problem.seed, neurons)
    return signs @ np.maximum(z - model.problem.threshold, 0) / math.sqrt(model.problem.width)


def test_predictions_are_the_network_written_out_in_all_chunks(trained):
    X, _, model = trained
    new = np.random.default_rng(1).standard_normal((2500, 6))
    for points in (X, new):
        expected = np.column_stack([written_out(model, target, points) for target in (0, 1)])
        np.testing.assert_allclose(model.predict(points), expected, atol=1e-12)


@pytest.mark.parametrize("neurons", [[-1], [3000], [0.5], [True, False], 7, [[1, 2]]])
def test_weights_of_neurons_that_there_are_not(trained, neurons):
    with pytest.raises(ValueError, match=r"whole numbers within 0\.\.2999; got "):
        trained[2].weights(neurons)


def test_only_what_fired_has_moved(trained):
    _, _, model = trained
    neurons = np.arange(3000)
    moved = np.any(model.weights(neurons) != initial_rows(0, neurons, 6, np.dtype(float)), axis=1)
    assert set(np.flatnonzero(moved)) <= set(model.alive)
    assert moved.sum() > 0.9 * len(model.alive)


def test_weights_are_the_training_points_combined(trained, oracle):
    """Gauss-Newton written out with full matrices: the weights, and so the outputs, are its weights."""
    _, Y, model = trained
    truth = oracle(model.problem)
    for _ in range(2):
        jacobian = truth.jacobian()
        truth.move(np.linalg.solve(jacobian @ jacobian.T, truth.outputs() - Y[:, 1]))
    np.testing.assert_allclose(model.weights(np.arange(3000), target=1), truth.weights, atol=1e-10)


def test_the_same_rows_in_any_company(trained):
    X, _, model = trained
    np.testing.assert_allclose(model.predict(X[3:4]), model.predict(X)[3:4], atol=1e-13)
    np.testing.assert_array_equal(model.predict(8 * X), model.predict(X))  # directions only


@pytest.mark.parametrize(
    ("points", "sentence"),
    [
        (np.ones((2, 5)), "X has 5 features, but the network was fitted on 6"),
        (np.full((1, 6), np.nan), "NaN"),
        (np.zeros((1, 6)), "zero norm"),
        (np.ones(6), "shape"),
    ],
)
def test_bad_points_are_refused(trained, points, sentence):
    with pytest.raises(ValueError, match=sentence):
        trained[2].predict(points)
