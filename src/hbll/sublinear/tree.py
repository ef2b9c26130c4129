"""The paper's correlation trees: for every point a complete binary maximum tree over the m values <w_r, x_i>.

arXiv 2208.04508, section 4: a query walks down from the root through the nodes above the threshold and meets exactly
the neurons that fire; a step changes the leaves of the neurons that fired on some point, and the paths from there to
the root.
"""

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
from numba import njit
from numpy.typing import NDArray

from .coefficients import add_step
from .pairs import Pairs
from .problem import Problem, settle
from .screen import rows_in_cache
from .threads import Chunk, in_chunks
from .weights import initial_rows, initial_signs

__all__ = ["Tree"]


@njit(nogil=True, cache=True)
def _build(tree):
    """Fill the inner nodes 1 .. m - 1 of one point's tree over the leaves m .. 2m - 1; node k has the children 2k, 2k
    + 1.
    """
    for node in range(tree.shape[0] // 2 - 1, 0, -1):
        tree[node] = max(tree[2 * node], tree[2 * node + 1])


@njit(nogil=True, cache=True)
def _query(tree, point, signs, moved, exact, stack, found):
    """Write the neurons that fire on the point into `found`, ascending within each level of leaves.

    Returns their number and the nodes visited.
    """
    m = tree.shape[0] // 2
    total = 0
    visited = 1
    depth = 0
    if tree[1] > exact.low:
        stack[0] = 1
        depth = 1
    while depth:
        depth -= 1
        node = stack[depth]
        if node >= m:
            r = node - m
            if tree[node] > exact.high or settle(
                exact, r, signs[r], point, moved.points, moved.values, moved.starts[r], moved.starts[r + 1]
            ):
                found[total] = r
                total += 1
            continue
        visited += 2
        for child in (2 * node + 1, 2 * node):
            if tree[child] > exact.low:
                stack[depth] = child
                depth += 1
    return total, visited


@njit(nogil=True, cache=True)
def _update(tree, fired, neurons, step, signs, correlation, scale, nodes):
    """Change one point's leaves of the neurons that fired somewhere, then the paths to the root, each node once.

    Returns the nodes touched and the multiply-adds.
    """
    m = tree.shape[0] // 2
    size = neurons.shape[0]
    for at in range(size):
        r = neurons[at]
        u = 0 * scale
        for p in range(fired.starts[r], fired.starts[r + 1]):
            u += step[fired.points[p]] * correlation[fired.points[p]]
        tree[m + r] -= scale * signs[r] * u
        nodes[at] = m + r
    touched = size
    while size:
        parents = 0
        for at in range(size):
            parent = nodes[at] >> 1
            if parent and (parents == 0 or nodes[parents - 1] != parent):
                value = max(tree[2 * parent], tree[2 * parent + 1])
                if tree[parent] != value:
                    tree[parent] = value
                    nodes[parents] = parent
                    parents += 1
                touched += 1
        size = parents
    return touched


@njit(nogil=True, cache=True)
def _by_neuron(found, bounds, trees, m):
    """Per-point lists of neurons, one after the other, as pairs by neuron: a counting sort, which keeps the points
    ascending.
    """
    starts = np.zeros(m + 1, np.int64)
    for p in range(found.shape[0]):
        starts[found[p] + 1] += 1
    for r in range(m):
        starts[r + 1] += starts[r]
    at = starts[:-1].copy()
    points = np.empty(found.shape[0], np.uint16)
    values = np.empty(found.shape[0], trees.dtype)
    for i in range(bounds.shape[0] - 1):
        for p in range(bounds[i], bounds[i + 1]):
            r = found[p]
            points[at[r]] = i
            values[at[r]] = trees[i, m + r]
            at[r] += 1
    return starts, points, values


class Tree:
    """n trees of 2m - 1 nodes in heap order; all m neurons are leaves, the dead ones too, as in the paper."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        m, rows = problem.width, rows_in_cache(problem)
        self.neurons = np.arange(m)
        self.signs = initial_signs(problem.seed, self.neurons)
        self.moved = Pairs.none(m, problem.dtype)
        self.work: Counter[str] = Counter()
        self.trees = np.empty((len(problem), 2 * m), problem.dtype)
        self.trees[:, 0] = -np.inf  # no node

        def leaves(chunks: Iterable[Chunk]) -> Iterator[None]:
            for first, last in chunks:
                weights = initial_rows(problem.seed, self.neurons[first:last], problem.features, problem.dtype)
                self.trees[:, m + first : m + last] = problem.points @ weights.T
                yield None

        def inner(chunks: Iterable[Chunk]) -> Iterator[None]:
            for point, _ in chunks:
                _build(self.trees[point])
                yield None

        in_chunks(leaves, m, rows)
        in_chunks(inner, len(problem), 1)

    def fired(self) -> Pairs:
        def work(chunks: Iterable[Chunk]) -> Iterator[tuple[NDArray[np.int32], int]]:
            stack, found = np.empty(2 * 64, np.int64), np.empty(self.problem.width, np.int32)
            for point, _ in chunks:
                total, visited = _query(
                    self.trees[point], point, self.signs, self.moved, self.problem.exact, stack, found
                )
                yield found[:total].copy(), visited

        found, visited = zip(*in_chunks(work, len(self.problem), 1), strict=True)
        self.work["nodes_visited"] += sum(visited)
        bounds = np.concatenate([[0], np.cumsum([len(neurons) for neurons in found])])
        return Pairs(*_by_neuron(np.concatenate(found), bounds, self.trees, self.problem.width))

    def move(self, fired: Pairs, step: NDArray[np.float64]) -> None:
        problem = self.problem
        rounded = step.astype(problem.dtype)
        neurons = np.flatnonzero(np.diff(fired.starts))

        def work(chunks: Iterable[Chunk]) -> Iterator[int]:
            nodes = np.empty(len(neurons), np.int64)
            for point, _ in chunks:
                yield _update(
                    self.trees[point],
                    fired,
                    neurons,
                    rounded,
                    self.signs,
                    problem.gram[point],
                    problem.dtype.type(problem.scale),
                    nodes,
                )

        self.work["nodes_touched"] += sum(in_chunks(work, len(problem), 1))
        self.work["multiply_adds"] += len(fired.points) * len(problem)
        self.moved = add_step(self.moved, fired, rounded)

    def coefficients(self) -> Pairs:
        return self.moved
