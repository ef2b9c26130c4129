import itertools
import math

import numpy as np
import pytest
from sklearn.datasets import load_digits

from hbll.sublinear import fit, training
from hbll.sublinear.problem import Problem, unit_rows
from hbll.sublinear.screen import screen


def random_task(n, d, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)), rng.standard_normal(n)


def test_gauss_newton_is_the_method_written_out(oracle):
    X, y = random_task(15, 6)
    model = fit(X, y, 800, 0.15, max_iter=4, tol=0, dtype="float64", seed=3)
    truth = oracle(model.problem)
    for entry in model.history:
        fires = truth.fires
        assert entry["fired"] == fires.sum()
        assert entry["alive"] == fires.any(axis=1).sum()
        jacobian = truth.jacobian()
        truth.move(np.linalg.solve(jacobian @ jacobian.T, truth.outputs() - y))
        assert entry["loss"] == pytest.approx(0.5 * np.sum((truth.outputs() - y) ** 2), rel=1e-6, abs=1e-20)
        assert entry["dense_operations"] == 800 * 15 * 6 + 15**3 // 3


def test_gradient_descent_is_the_method_written_out(oracle):
    X, y = random_task(10, 5)
    model = fit(X, y, 500, 0.1, method="gradient-descent", max_iter=20, tol=0, dtype="float64")
    truth = oracle(model.problem)
    jacobian = truth.jacobian()
    rate = 1 / np.linalg.norm(jacobian @ jacobian.T, 2)
    losses = []
    for _ in range(20):
        truth.move(rate * (truth.outputs() - y))
        losses.append(0.5 * np.sum((truth.outputs() - y) ** 2))
    np.testing.assert_allclose([entry["loss"] for entry in model.history], losses, rtol=1e-9)


def test_random_points_converge_within_ten_iterations():
    X, y = random_task(64, 16)
    model = fit(X, y, 2**12, kappa=0.2, max_iter=10)
    assert model.converged
    assert model.history[-1]["loss"] < 1e-10


def test_digits_as_regression_converge_within_ten_iterations():
    digits = load_digits()
    y = (digits.target[:64] - 4.5) / 4.5
    model = fit(digits.data[:64], y, 2**12, kappa=0.2, max_iter=10)
    assert model.history[-1]["loss"] < 1e-10
    np.testing.assert_allclose(model.predict(digits.data[:64]), y, atol=2e-5)


def test_clusters_converge_under_damping():
    rng = np.random.default_rng(0)
    X = np.repeat(rng.standard_normal((8, 10)), 6, axis=0) + 0.2 * rng.standard_normal((48, 10))
    y = np.repeat(rng.standard_normal(8), 6) + 0.1 * rng.standard_normal(48)
    model = fit(X, y, 2**13, 0.1, method="levenberg-marquardt", dtype="float64", max_iter=60)
    losses = [entry["loss"] for entry in model.history]
    assert all(after <= before for before, after in itertools.pairwise(losses))
    assert model.converged


def test_one_point_is_hit():
    model = fit([[3.0, 4.0]], [2.0], 200, 0.05, dtype="float64")
    assert model.converged
    assert model.predict([[0.6, 0.8]]) == pytest.approx([2.0], abs=1e-4)


def test_several_targets_are_the_single_ones():
    X, y = random_task(20, 6)
    Y = np.column_stack([y, y**2, np.zeros(20)])
    together = fit(X, Y, 2000, 0.15, dtype="float64", engine="compact")
    for k in range(3):
        alone = fit(X, Y[:, k], 2000, 0.15, dtype="float64", engine="compact")
        np.testing.assert_array_equal(together.predict(X)[:, k], alone.predict(X))
        for i, entry in enumerate(together.history):
            own = alone.history[min(i, len(alone.history) - 1)]["loss"]
            assert entry["losses"][k] == own
    for entry in together.history:
        assert entry["loss"] == sum(entry["losses"])
    assert together.predict(X).shape == (20, 3)


@pytest.mark.parametrize("engine", ["slack", "tree"])
def test_several_targets_in_lists_and_trees(engine):
    X, y = random_task(12, 5)
    Y = np.column_stack([y, -3 * y])
    model = fit(X, Y, 1500, 0.1, dtype="float64", engine=engine)
    np.testing.assert_allclose(model.predict(X), Y, atol=1e-4)


def test_history_has_an_entry_per_iteration():
    X, y = random_task(20, 6)
    model = fit(X, y, 2000, 0.15, engine="slack")
    wanted = {"loss", "losses", "seconds", "fired", "alive", "accepted", "damping", "operations", "dense_operations"}
    for entry in model.history:
        assert wanted | {"entries_visited", "multiply_adds"} <= set(entry)
        assert entry["seconds"] > 0
    alive = [entry["alive"] for entry in model.history]
    assert alive == sorted(alive, reverse=True)
    assert model.history[-1]["loss"] <= 1e-10 < model.history[-2]["loss"]
    assert fit(X, y, 2000, 0.15, max_iter=0).history == []


def test_the_same_call_gives_the_same_bits():
    X, y = random_task(30, 6)
    first, second = (fit(X, y, 3000, seed=4) for _ in range(2))
    np.testing.assert_array_equal(first.predict(X), second.predict(X))
    assert not np.array_equal(fit(X, y, 3000, seed=5).predict(X), first.predict(X))


def test_auto_takes_the_cheapest_it_foretold(monkeypatch):
    X, y = random_task(20, 6)
    told = []
    true_forecast = training.forecast
    monkeypatch.setattr(training, "forecast", lambda *a: told.append(true_forecast(*a)) or told[-1])
    model = fit(X, y, 2**13)
    assert told[-1].alive == len(model.alive)
    assert model.engine == min(told[-1].seconds, key=told[-1].seconds.get)


def test_auto_leaves_out_what_does_not_fit_the_machine(monkeypatch):
    problem = Problem.of(unit_rows(random_task(40, 3)[0], "X"), 2**12, 0.0, 0, np.float32)
    needed = training.forecast(problem, screen(problem, np.full(40, 5.0)), 2**12).bytes
    assert needed["compact"] < needed["slack"]
    monkeypatch.setattr(training, "machine_bytes", lambda: (needed["compact"] + needed["slack"]) / 2)
    names = training._affordable(problem, np.full(40, 5.0), "auto")
    assert "compact" in names
    assert "slack" not in names


@pytest.mark.parametrize("kappa", [0.2, 0.3])
def test_pairs_that_fire_grow_with_the_width_to_the_one_minus_kappa(kappa):
    X, y = random_task(64, 32)
    widths = np.array([2**12, 2**14, 2**16, 2**18])
    fired = [fit(X, y, int(width), kappa, max_iter=0, engine="compact").start["fired"] for width in widths]
    exponent = np.polyfit(np.log(widths), np.log(fired), 1)[0]
    assert exponent == pytest.approx(1 - kappa, abs=0.1)


X, y = random_task(6, 3)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"X": X * np.where(np.arange(6) == 2, np.nan, 1)[:, None]}, "X holds NaN or infinity, first in row 2"),
        ({"X": X * (np.arange(6) != 4)[:, None]}, "row 4 of X has zero norm"),
        ({"X": X[0]}, "X has shape"),
        ({"y": y[:5]}, r"y has shape \(5,\), but X has 6 points"),
        ({"y": np.ones((6, 0))}, "y has shape"),
        ({"y": np.append(y[:5], np.inf)}, "y holds NaN or infinity"),
        ({"y": 1e30 * y}, r"y reaches .*; scale it"),
        ({"width": 0}, "width is 0"),
        ({"width": 10**13}, r"GiB of memory, and this machine has"),
        ({"width": 2**40, "engine": "dense"}, r"engine 'dense' with width 1099511627776 on 6 points would need"),
        ({"kappa": -0.1}, "kappa is -0.1"),
        ({"kappa": math.nan}, "kappa is nan"),
        ({"kappa": 20.0}, "none of 100 neurons fires on any of the 6 points"),
        ({"kappa": 20.0, "engine": "tree"}, "no neuron fires on point 0"),
        ({"kappa": 20.0, "engine": "tree", "method": "gradient-descent"}, "no neuron fires on point 0"),
        ({"engine": "forest"}, "engine is 'forest'; one of auto, tree, slack, compact, dense"),
        ({"method": "adam"}, "method is 'adam'"),
        ({"solver": "qr"}, "solver is 'qr'"),
        ({"dtype": "int32"}, "dtype is 'int32'"),
        ({"max_iter": -1}, "max_iter is -1"),
        ({"tol": math.nan}, "tol is nan"),
        ({"ridge": -1.0}, "ridge is -1.0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_input_is_one_clear_sentence(change, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        fit(**{"X": X, "y": y, "width": 100, "kappa": 0.05} | change)
    assert "\n" not in str(caught.value)


def test_too_many_points_are_refused_before_anything_is_built():
    with pytest.raises(ValueError, match="X has 65536 points"):
        fit(np.ones((2**16, 1)), np.ones(2**16), 10)


def test_steps_without_bound_end_the_fit():
    with pytest.raises(ValueError, match=r"the step of iteration 1 reaches .*levenberg-marquardt"):
        fit([[1, 0], [1, 1e-6]], [1e17, -1e17], 100, 0.05, dtype="float64")
