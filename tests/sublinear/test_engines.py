"""All engines against the network written out, and against each other along whole trajectories."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbll.sublinear import fit
from hbll.sublinear.compact import Compact
from hbll.sublinear.dense import Dense
from hbll.sublinear.engine import ENGINES
from hbll.sublinear.pairs import tally
from hbll.sublinear.problem import Problem, unit_rows
from hbll.sublinear.screen import screen
from hbll.sublinear.slack import Slack
from hbll.sublinear.tree import Tree


def build(name, problem, reach=0.3):
    n = len(problem)
    if name == "slack":
        return Slack(problem, screen(problem, np.full(n, reach)))
    return {"compact": lambda: Compact(problem, screen(problem, np.zeros(n))), "dense": lambda: Dense(problem)}.get(
        name, lambda: Tree(problem)
    )()


def fires_of(engine, fired, problem):
    out = np.zeros((problem.width, len(problem)), bool)
    out[np.repeat(engine.neurons, np.diff(fired.starts)), fired.points] = True
    return out


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_an_engine_follows_the_weights(make_problem, oracle, dense_matrix, name, dtype):
    problem = make_problem(n=15, d=6, width=700, kappa=0.15, dtype=dtype, copies=3)
    truth, engine = oracle(problem), build(name, problem)
    tolerance = 1e-12 if dtype == "float64" else 2e-5
    rng = np.random.default_rng(0)
    moved = np.zeros((problem.width, 15))
    for _ in range(5):
        fired = engine.fired()
        fires = fires_of(engine, fired, problem)
        np.testing.assert_array_equal(fires, truth.fires)
        np.testing.assert_allclose(dense_matrix(fired, 15)[fires[engine.neurons]], truth.z[fires], atol=tolerance)
        step = rng.standard_normal(15)
        engine.move(fired, step)
        moved += fires * step
        truth.move(step)
        np.testing.assert_allclose(dense_matrix(engine.coefficients(), 15), moved[engine.neurons], atol=tolerance)
    rest = np.delete(moved, engine.neurons, axis=0)
    assert not rest.any()


points_and_widths = {
    "n": st.integers(1, 9),
    "d": st.integers(1, 4),
    "width": st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 257])),
    "kappa": st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    "seed": st.integers(0, 50),
    "copies": st.integers(0, 4),
    "reach": st.sampled_from([1e-9, 0.05, 10.0]),
    "size": st.sampled_from([1e-6, 0.3, 30.0]),
    "tie": st.integers(0, 3),
}


@settings(max_examples=100, deadline=None)
@given(**points_and_widths)
def test_fuzz(oracle, with_threshold, n, d, width, kappa, seed, copies, reach, size, tie):
    """Ties z == b, points that coincide, odd sizes, one point, nothing fires, everything dead, tiny slack, long steps."""
    points = np.random.default_rng(seed).standard_normal((n, d))
    points[n - min(copies, n // 2) :] = points[: min(copies, n // 2)]
    problem = Problem.of(unit_rows(points, "X"), width, kappa, seed, np.float64)
    truth = oracle(problem)
    if tie:  # the threshold is the z of some pair, to the last bit of one order of summation
        z = 0.0
        for k in range(d):
            z += truth.weights[tie % width, k] * truth.points[seed % n, k]
        problem = with_threshold(problem, z)
        truth.problem = problem
    alive_at_start = len(screen(problem, np.zeros(n)).neurons)
    names = ENGINES if alive_at_start else ("tree", "dense")
    engines = {name: build(name, problem, reach) for name in names}
    alive = np.full(width, True)
    rng = np.random.default_rng(seed)
    for _ in range(4):
        step = size * rng.standard_normal(n)
        seen = {}
        for name, engine in engines.items():
            fired = engine.fired()
            seen[name] = fires_of(engine, fired, problem)
            if name == "slack":
                assert (engine.left >= 0).all()  # the path walked is within the slack wherever the list is used
                check_lists(engine, truth)
            counts = tally(fired, engine.signs, problem, with_shared=True)
            np.testing.assert_array_equal(counts.shared, counts.shared.T)
            np.testing.assert_array_equal(np.diag(counts.shared), np.bincount(fired.points, minlength=n))
            np.testing.assert_allclose(counts.outputs, truth.outputs(), atol=1e-10 * (1 + size))
            engine.move(fired, step)
        for name in names:
            np.testing.assert_array_equal(seen[name], seen["dense"])
        sure = np.abs(truth.z - problem.threshold) > 1e-9  # on a tie the oracle's own rounding decides
        np.testing.assert_array_equal(seen["dense"][sure], truth.fires[sure])
        now = seen["dense"].any(axis=1)
        assert not (now & ~alive).any()  # dead stays dead
        alive = now
        shift = (seen["dense"] * step) @ truth.points
        truth.weights -= truth.signs[:, None] * shift / math.sqrt(width)


def check_lists(engine, truth):
    """Points outside a list have z <= b, and the entries are the products themselves."""
    for row in np.flatnonzero(engine.live):
        where = slice(engine.begins[row], engine.begins[row] + engine.lengths[row])
        listed = engine.points[where]
        assert (np.diff(listed.astype(int)) > 0).all()
        z = truth.z[engine.neurons[row]]
        np.testing.assert_allclose(engine.z[where], z[listed], atol=1e-9)
        assert (np.delete(z, listed) <= truth.problem.threshold).all()


def trajectories(X, y, dtype, **options):
    """Outputs on the training points after 0, 1, 2, ... iterations, by engine."""
    out = {}
    for name in ENGINES:
        out[name] = [
            fit(X, y, engine=name, dtype=dtype, tol=0, max_iter=k, **options).predict(X) for k in (0, 1, 2, 3, 6)
        ]
    return out


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5)])
@pytest.mark.parametrize("method", ["gauss-newton", "levenberg-marquardt", "gradient-descent"])
def test_all_engines_take_the_same_trajectory(dtype, tolerance, method):
    rng = np.random.default_rng(1)
    X, y = rng.standard_normal((40, 12)), rng.standard_normal(40)
    outputs = trajectories(X, y, dtype, width=2**12, kappa=0.2, method=method)
    for name in ENGINES:
        assert np.abs(np.array(outputs[name]) - outputs["dense"]).max() <= tolerance * np.abs(y).max()


def test_undone_steps_leave_no_trace():
    rng = np.random.default_rng(2)
    X = np.repeat(rng.standard_normal((6, 5)), 5, axis=0) + 0.05 * rng.standard_normal((30, 5))
    y = rng.standard_normal(30)
    models = {
        name: fit(X, y, 500, 0.2, name, method="levenberg-marquardt", max_iter=25, tol=0, dtype="float64")
        for name in ENGINES
    }
    accepted = [entry["accepted"] for entry in models["dense"].history]
    assert not all(accepted)
    for model in models.values():
        assert [entry["accepted"] for entry in model.history] == accepted
        np.testing.assert_allclose(
            [entry["loss"] for entry in model.history],
            [entry["loss"] for entry in models["dense"].history],
            rtol=1e-8,
        )


def test_engines_agree_where_rounding_decides_in_float32():
    """Wide enough that float32 rounding would let some pair fire for one engine only, were it to decide."""
    rng = np.random.default_rng(5)
    X, y = rng.standard_normal((200, 16)), rng.standard_normal(200)
    runs = [fit(X, y, 2**15, 0.2, name, max_iter=3, tol=0) for name in ("slack", "compact", "dense")]
    for run in runs[1:]:
        assert [entry["fired"] for entry in run.history] == [entry["fired"] for entry in runs[0].history]
        assert np.abs(run.predict(X) - runs[0].predict(X)).max() <= 1e-5 * np.abs(y).max()
