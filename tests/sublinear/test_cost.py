import math

import numpy as np
import pytest

from hbll.sublinear import cost
from hbll.sublinear.dense import Dense
from hbll.sublinear.screen import screen
from hbll.sublinear.slack import Slack
from hbll.sublinear.tree import Tree


def test_after_the_screen_the_counts_are_those_of_the_first_iteration(make_problem, oracle):
    problem = make_problem(n=30, d=8, width=3000, kappa=0.2)
    screened = screen(problem, np.full(30, 0.2))
    told = cost.forecast(problem, screened, problem.width)
    fires = oracle(problem).fires
    assert told.alive == fires.any(axis=1).sum()
    assert told.fired == fires.sum()
    slack = Slack(problem, screened)
    slack.fired()
    assert told.entries == slack.work["entries_visited"] == slack.used
    assert told.list_work == pytest.approx(fires[slack.neurons].sum(axis=1) @ np.minimum(slack.lengths, 30 / 8))


def test_a_pilot_foretells_within_sampling_error(make_problem):
    problem = make_problem(n=30, d=8, width=2**15, kappa=0.2)
    reach = np.full(30, 0.2)
    whole = cost.forecast(problem, screen(problem, reach), problem.width)
    pilot = cost.forecast(problem, screen(problem, reach, 4096), 4096)
    for name in ("alive", "fired", "entries", "list_work"):
        assert getattr(pilot, name) == pytest.approx(getattr(whole, name), rel=0.15)


def test_tree_nodes_are_foretold_within_a_factor_of_two(make_problem):
    problem = make_problem(n=20, d=10, width=2**13, kappa=0.3)
    told = cost.forecast(problem, screen(problem, np.zeros(20)), problem.width)
    tree = Tree(problem)
    fired = tree.fired()
    tree.move(fired, np.ones(20))
    assert 0.5 < tree.work["nodes_visited"] / (20 * cost._paths(told.fired / 20, 2**13)) < 2
    assert 0.5 < tree.work["nodes_touched"] / (20 * cost._paths(told.alive, 2**13)) < 2


def test_paths_of_every_leaf_are_the_tree_and_of_one_a_path():
    assert cost._paths(1024, 1024) == 2 * 1024
    assert cost._paths(1, 1024) == pytest.approx(math.log2(1024) + 2)


def test_the_baseline_is_m_n_d_and_the_solve(make_problem):
    assert cost.dense_operations(make_problem(n=12, d=5, width=300)) == 300 * 12 * 5 + 12**3 // 3


def test_memory_is_at_least_what_the_arrays_take(make_problem):
    problem = make_problem(n=30, d=8, width=3000, kappa=0.2)
    screened = screen(problem, np.full(30, 0.2))
    told = cost.forecast(problem, screened, problem.width).bytes

    def held(engine):
        return sum(value.nbytes for value in vars(engine).values() if isinstance(value, np.ndarray))

    for name, engine in (("slack", Slack(problem, screened)), ("dense", Dense(problem)), ("tree", Tree(problem))):
        assert held(engine) <= told[name] <= 4 * held(engine)
