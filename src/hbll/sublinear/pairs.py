"""Sparse (neuron, point) pairs: which neurons fire on which points, and what follows from that alone."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from .problem import Problem
from .threads import Chunk, in_chunks

__all__ = ["Pairs", "Tally", "join", "tally"]

ROWS = 4096  # rows a thread takes at a time; fixed, so that sums are reduced in an order that no thread count changes


class Pairs(NamedTuple):
    """For row q the pairs starts[q] .. starts[q + 1] - 1; within a row the points ascend. (CSR, without the words.)"""

    starts: NDArray[np.int64]  # (rows + 1,)
    points: NDArray[np.uint16]  # (pairs,)
    values: NDArray  # (pairs,)

    @classmethod
    def none(cls, rows: int, dtype: np.dtype) -> "Pairs":
        return cls(np.zeros(rows + 1, np.int64), np.empty(0, np.uint16), np.empty(0, dtype))


Part = tuple[NDArray[np.uint16], NDArray]  # points and values of some rows


def join(counts: NDArray[np.int64], parts: list[Part]) -> Pairs:
    """Chunks of rows one below the other; counts (rows,) are the pairs of each row."""
    starts = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=starts[1:])
    points, values = zip(*parts, strict=True)
    return Pairs(starts, np.concatenate(points), np.concatenate(values))


class Tally(NamedTuple):
    """What the fired pairs say about the network on its training points."""

    outputs: NDArray[np.float64]  # (n,): f(x_i)
    shared: NDArray[np.int32] | None  # (n, n): C_ij, the neurons that fire on both points
    alive: int  # neurons that fire on at least one
    work: int  # additions: sum_r |S_r| (|S_r| + 1) / 2 with `shared`, sum_r |S_r| without


@njit(nogil=True, cache=True)
def _tally_rows(fired, signs, threshold, first, last, outputs, shared):
    alive = 0
    work = 0
    for row in range(first, last):
        start, stop = fired.starts[row], fired.starts[row + 1]
        if start == stop:
            continue
        alive += 1
        sign = signs[row]
        for p in range(start, stop):
            i = fired.points[p]
            outputs[i] += sign * (np.float64(fired.values[p]) - threshold)
        if shared.shape[0]:
            for p in range(start, stop):
                i = fired.points[p]
                for q in range(p, stop):
                    shared[i, fired.points[q]] += 1
            work += (stop - start) * (stop - start + 1) // 2
        else:
            work += stop - start
    return alive, work


def tally(fired: Pairs, signs: NDArray[np.int8], problem: Problem, with_shared: bool) -> Tally:
    """Outputs on the training points and, if asked, the counts C that make the Gram matrix K o C / m of the Jacobian."""
    n = len(problem)
    matrices = []

    def work(chunks: Iterable[Chunk]) -> Iterator[tuple]:
        shared = np.zeros((n, n) if with_shared else (0, 0), np.int32)
        matrices.append(shared)
        for first, last in chunks:
            outputs = np.zeros(n)
            yield outputs, *_tally_rows(fired, signs, problem.threshold, first, last, outputs, shared)

    outputs, alive, additions = zip(*in_chunks(work, len(signs), ROWS), strict=True)
    shared = None
    if with_shared:
        upper = sum(matrices[1:], start=matrices[0])  # whole numbers: the order of the threads does not matter
        shared = upper + upper.T
        np.fill_diagonal(shared, np.diagonal(upper))
    return Tally(np.sum(outputs, axis=0) * problem.scale, shared, sum(alive), sum(additions))
