import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbll.sublinear.tree import Tree


def check_maxima(trees):
    m = trees.shape[1] // 2
    nodes = np.arange(1, m)
    np.testing.assert_array_equal(trees[:, nodes], np.maximum(trees[:, 2 * nodes], trees[:, 2 * nodes + 1]))
    if m > 1:
        np.testing.assert_array_equal(trees[:, 1], trees[:, m:].max(axis=1))


@settings(deadline=None, max_examples=30)
@given(width=st.integers(1, 70), n=st.integers(1, 4), seed=st.integers(0, 20))
def test_every_node_is_the_larger_of_its_children_before_and_after_steps(make_problem, oracle, width, n, seed):
    problem = make_problem(n=n, d=3, width=width, kappa=0.05, seed=seed)
    truth, tree = oracle(problem), Tree(problem)
    for _ in range(3):
        check_maxima(tree.trees)
        np.testing.assert_allclose(tree.trees[:, width:], truth.z.T, atol=1e-12)
        step = np.random.default_rng(seed).standard_normal(n)
        tree.move(tree.fired(), step)
        truth.move(step)


def test_a_query_visits_no_more_than_the_paths_to_what_it_finds(make_problem):
    problem = make_problem(n=8, d=5, width=1024, kappa=0.3)
    tree = Tree(problem)
    found = len(tree.fired().points)
    # one root per point, and at most two children per node on each of the found leaves' paths of ten
    assert 8 <= tree.work["nodes_visited"] <= 8 + 2 * 10 * found


def test_an_update_touches_the_union_of_the_paths(make_problem):
    problem = make_problem(n=6, d=5, width=512, kappa=0.3)
    tree = Tree(problem)
    fired = tree.fired()
    tree.move(fired, np.ones(6))
    leaves = 512 + np.flatnonzero(np.diff(fired.starts))
    union = set()
    for leaf in leaves:
        while leaf:
            union.add(leaf)
            leaf >>= 1
    # a path ends early where a maximum does not change, so the union is an upper bound; the leaves a lower one
    assert 6 * len(leaves) <= tree.work["nodes_touched"] <= 6 * len(union)


@pytest.mark.parametrize("kappa", [0.2, 0.4])
def test_visits_grow_with_what_fires_and_not_with_the_width(make_problem, kappa):
    counts = []
    for width in (2**10, 2**13):
        tree = Tree(make_problem(n=20, d=10, width=width, kappa=kappa))
        found = len(tree.fired().points)
        counts.append(tree.work["nodes_visited"] / (found * math.log2(width)))
    assert max(counts) <= 2
