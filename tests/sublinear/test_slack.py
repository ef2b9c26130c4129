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
        spent = engine.slack - problem.band - engine.left
        np.testing.assert_allclose(spent, walked[engine.neurons], atol=1e-9)


def test_a_certificate_that_ends_is_renewed_with_twice_the_path(make_problem):
    problem = make_problem(n=10, d=4, width=200)
    engine = Slack(problem, screen(problem, np.full(10, 1e-6)))
    fired = engine.fired()
    rows = np.diff(fired.starts)
    before = engine.slack.copy()
    gram, step = problem.exact.gram, np.ones(10)
    engine.move(fired, step)
    assert engine.work["rows_relisted"] == (rows > 0).sum()
    for row in range(3):
        points = fired.points[slice(*fired.starts[row : row + 2])]
        path = math.sqrt(gram[np.ix_(points, points)].sum() / 200)
        assert engine.slack[row] == pytest.approx(2 * path, rel=1e-6)
        assert engine.slack[row] > before[row]


def test_a_long_path_ends_few_lists(make_problem):
    """The slack doubles with the path: a row of 64 equal steps is listed anew at most a logarithm of times."""
    problem = make_problem(n=6, d=4, width=50, kappa=0.02)
    engine = Slack(problem, screen(problem, np.full(6, 1e-9)))
    for _ in range(64):
        engine.move(engine.fired(), np.full(6, 1e-3))
    assert engine.work["rows_relisted"] <= len(engine.neurons) * (1 + math.log2(64))


def test_gaps_are_closed_before_they_outgrow_the_lists(make_problem):
    problem = make_problem(n=10, d=4, width=300)
    engine = Slack(problem, screen(problem, np.full(10, 0.01)))
    for k in range(8):
        engine.move(engine.fired(), np.random.default_rng(k).standard_normal(10) * 2**k)
        assert len(engine.points) == len(engine.z) == len(engine.changes)
        assert len(engine.points) <= 2 * engine.lengths.sum()


def test_expected_reach_is_one_and_a_half_first_steps(make_problem):
    problem = make_problem(n=2, width=400)
    reach = expected_reach(problem, np.array([[1.0, 0.0], [-2.0, 1.0]]))
    spread = 0.15 * (1 + 0 + 2 + 1) / 4
    expected = 1.5 * (np.array([1, 2]) + spread) / (math.sqrt(400) * problem.share)
    np.testing.assert_allclose(reach, expected)
