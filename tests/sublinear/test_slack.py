import math

import numpy as np
import pytest

from hbll.sublinear.screen import screen
from hbll.sublinear.slack import Slack, expected_reach


def test_the_path_walked_is_the_length_of_the_steps(make_problem, oracle):
    problem = make_problem(n=10, d=4, width=200)
    truth, engine = oracle(problem), Slack(problem, screen(problem, np.full(10, 1e3)))
    walked = np.zeros(200)
    for k in range(3):
        before = truth.weights.copy()
        step = np.random.default_rng(k).standard_normal(10)
        engine.move(engine.fired(), step)
        truth.move(step)
        walked += np.linalg.norm(truth.weights - before, axis=1)
        spent = engine.walked + engine.slack - problem.band - engine.left
        np.testing.assert_allclose(spent, walked[engine.neurons], atol=1e-9)


def test_a_certificate_that_ends_is_renewed_with_half_the_path(make_problem):
    problem = make_problem(n=10, d=4, width=200)
    engine = Slack(problem, screen(problem, np.full(10, 1e-6)))
    fired = engine.fired()
    rows = np.diff(fired.starts)
    engine.move(fired, np.ones(10))
    assert engine.work["rows_relisted"] == (rows > 0).sum()
    for row in range(3):
        points = fired.points[slice(*fired.starts[row : row + 2])]
        path = math.sqrt(problem.exact.gram[np.ix_(points, points)].sum() / 200)
        assert engine.slack[row] == pytest.approx(path / 2, rel=1e-6)


def test_a_long_path_ends_few_lists(make_problem):
    """The slack grows with the path by halves: a row of 64 equal steps is listed anew at most a logarithm of times."""
    problem = make_problem(n=6, d=4, width=50, kappa=0.02)
    engine = Slack(problem, screen(problem, np.full(6, 1e-9)))
    for _ in range(64):
        engine.move(engine.fired(), np.full(6, 1e-3))
    # a list of path D holds for D / 2 more, in whole steps: 1, 2, 3, 4, 6, 9, ... of them
    assert engine.work["rows_relisted"] <= len(engine.neurons) * (2 + math.log(64, 1.5))


def test_lists_are_trimmed_once_the_steps_are_short(make_problem):
    problem = make_problem(n=30, d=6, width=400)
    engine = Slack(problem, screen(problem, np.full(30, 0.5)))
    fired = engine.fired()
    neuron = int(np.diff(fired.starts).argmin())
    points = fired.points[slice(*fired.starts[neuron : neuron + 2])]
    long = 0.4 * engine.slack[neuron]
    step = np.full(30, long / math.sqrt(problem.exact.gram[np.ix_(points, points)].sum() / 400))
    engine.move(fired, step)  # a long step: no trim
    assert engine.left[neuron] == pytest.approx(engine.slack[neuron] - long, rel=1e-6)
    entries = engine.lengths[neuron]
    engine.move(fired, 0.1 * step)  # the path is 1.1 long, and more than a quarter of it is left
    assert engine.left[neuron] == pytest.approx(1.1 * long / 8, rel=1e-6)
    assert engine.lengths[neuron] <= entries
    begin = engine.begins[neuron]
    kept = slice(begin, begin + engine.lengths[neuron])
    assert np.all((engine.z[kept] > problem.threshold - engine.slack[neuron]) | (engine.changes[kept] != 0))


def test_gaps_are_closed_before_they_outgrow_the_lists(make_problem):
    problem = make_problem(n=10, d=4, width=300)
    engine = Slack(problem, screen(problem, np.full(10, 0.01)))
    for k in range(8):
        engine.move(engine.fired(), np.random.default_rng(k).standard_normal(10) * 2**k)
        assert len(engine.points) == len(engine.z) == len(engine.changes)
        assert len(engine.points) <= 4 * engine.lengths.sum()


def test_expected_reach_is_a_first_step_with_a_margin(make_problem):
    problem = make_problem(n=2, width=400)
    reach = expected_reach(problem, np.array([[1.0, 0.0], [-2.0, 1.0]]))
    spread = 0.15 * (1 + 0 + 2 + 1) / 4
    expected = 1.7 * (np.array([1, 2]) + spread) / (math.sqrt(400) * problem.share)
    np.testing.assert_allclose(reach, expected)


def test_what_fired_stays_listed_for_the_step_may_be_undone(make_problem):
    problem = make_problem(n=10, d=4, width=200)
    engine = Slack(problem, screen(problem, np.full(10, 1e-6)))
    fired = engine.fired()
    for step in (np.ones(10), -np.ones(10), np.full(10, 50.0)):  # undone to exactly nothing, then far away
        engine.move(fired, step)
        for row in np.flatnonzero(np.diff(fired.starts)):
            listed = engine.points[engine.begins[row] : engine.begins[row] + engine.lengths[row]]
            assert set(fired.points[slice(*fired.starts[row : row + 2])]) <= set(listed)
