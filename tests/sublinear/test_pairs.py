import numpy as np
import pytest

from hbll.sublinear import pairs as module
from hbll.sublinear import threads
from hbll.sublinear.dense import Dense
from hbll.sublinear.pairs import join, tally


def test_join_puts_rows_below_each_other():
    part = lambda *points: (np.array(points, np.uint16), np.array(points, float))  # noqa: E731
    joined = join(np.array([2, 0, 1, 1]), [part(1, 4), part(0, 3)])
    np.testing.assert_array_equal(joined.starts, [0, 2, 2, 3, 4])
    np.testing.assert_array_equal(joined.points, [1, 4, 0, 3])
    np.testing.assert_array_equal(joined.values, [1, 4, 0, 3])


@pytest.mark.parametrize("count", [1, 3])
def test_tally_is_the_network_written_out(make_problem, oracle, monkeypatch, count):
    monkeypatch.setattr(threads, "thread_count", lambda: count)
    monkeypatch.setattr(module, "ROWS", 37)
    problem = make_problem()
    truth, engine = oracle(problem), Dense(problem)
    result = tally(engine.fired(), engine.signs, problem, with_shared=True)
    np.testing.assert_allclose(result.outputs, truth.outputs(), atol=1e-13)
    fires = truth.fires.astype(int)
    np.testing.assert_array_equal(result.shared, fires.T @ fires)
    np.testing.assert_array_equal(result.shared, result.shared.T)
    np.testing.assert_array_equal(np.diag(result.shared), fires.sum(axis=0))
    sizes = fires.sum(axis=1)
    assert result.alive == (sizes > 0).sum()
    assert result.work == (sizes * (sizes + 1) // 2).sum()


def test_without_the_shared_counts_only_the_pairs_are_visited(make_problem):
    engine = Dense(make_problem())
    fired = engine.fired()
    result = tally(fired, engine.signs, engine.problem, with_shared=False)
    assert result.shared is None
    assert result.work == len(fired.points)


def test_sums_do_not_depend_on_the_number_of_threads(make_problem, monkeypatch):
    monkeypatch.setattr(module, "ROWS", 16)
    engine = Dense(make_problem(width=2000))
    fired = engine.fired()
    results = []
    for count in (1, 2, 4):
        monkeypatch.setattr(threads, "thread_count", lambda count=count: count)
        results.append(tally(fired, engine.signs, engine.problem, with_shared=True).outputs)
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])
