"""One pass over all neurons at the start: who fires, and who can be forgotten.

A neuron that fires on no training point gets no gradient, so it does not move and never fires: in full-batch training
without momentum or decay the alive set only shrinks, and this pass replaces all later search, exactly.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from .pairs import Pairs, Part, join
from .problem import Exact, Problem, settle
from .threads import Chunk, in_chunks
from .weights import initial_rows, initial_signs

__all__ = ["Screen", "fired_among", "rows_in_cache", "screen"]

CACHED = 1 << 17  # values <w_r, x_j> that a thread computes at a time: half a megabyte in float32, a second-level cache


def rows_in_cache(problem: Problem) -> int:
    return max(16, CACHED // len(problem))


@njit(nogil=True, cache=True)
def _confirm(candidates, z, neurons, signs, moved, first_moved, exact, counts, points, values):
    """Keep the candidates (flat places in z (r, n), ascending) that fire; returns their number."""
    total = 0
    n = z.shape[1]
    row = 0
    counts[:] = 0
    for place in candidates:
        while place >= (row + 1) * n:
            row += 1
        j = place - row * n
        value = z[row, j]
        if value > exact.high or settle(
            exact,
            neurons[row],
            signs[row],
            j,
            moved.points,
            moved.values,
            moved.starts[first_moved + row],
            moved.starts[first_moved + row + 1],
        ):
            points[total] = j
            values[total] = value
            total += 1
            counts[row] += 1
    return total


def fired_among(
    z: NDArray,
    neurons: NDArray[np.int64],
    signs: NDArray[np.int8],
    moved: Pairs,
    first_moved: int,
    exact: Exact,
    counts: NDArray[np.int64],
) -> Part:
    """The pairs of z (r, n) above the threshold; their number per row goes to `counts` (r,).

    Row q has moved by the coefficients in row first_moved + q of `moved`.
    """
    candidates = np.flatnonzero(z > exact.low)
    points, values = np.empty(len(candidates), np.uint16), np.empty(len(candidates), z.dtype)
    total = _confirm(candidates, z, neurons, signs, moved, first_moved, exact, counts, points, values)
    return points[:total], values[:total]


class Screen(NamedTuple):
    """The neurons that are alive at the start, and their lists."""

    neurons: NDArray[np.int64]  # (alive,), ascending
    signs: NDArray[np.int8]  # (alive,)
    lists: Pairs  # (alive) rows: the pairs that fire, and with a reach those within `slack` below the threshold
    slack: NDArray[np.float64]  # (alive,)


def screen(problem: Problem, reach: NDArray[np.float64], width: int | None = None) -> Screen:
    """Compute <w_r, x_j> for every neuron in chunks that fit a cache, and keep the neurons that fire.

    reach (n,) says how far a neuron is expected to move for each point it fires on (0: keep only the pairs that
    fire); `width` looks at the first neurons only. Costs m d + m n d operations (arXiv 2208.04508, the initialisation
    of section 4).
    """
    rows, n = rows_in_cache(problem), len(problem)

    def work(chunks: Iterable[Chunk]) -> Iterator[tuple]:
        buffer = np.empty((rows, n), problem.dtype)
        at_rest = Pairs.none(rows, problem.dtype)
        for first, last in chunks:
            neurons = np.arange(first, last)
            signs = initial_signs(problem.seed, neurons)
            z = buffer[: last - first]
            np.dot(initial_rows(problem.seed, neurons, problem.features, problem.dtype), problem.points.T, out=z)
            counts = np.empty(len(neurons), np.int64)
            part = fired_among(z, neurons, signs, at_rest, 0, problem.exact, counts)
            alive = counts > 0
            slack = np.zeros(len(neurons))
            if reach.any():
                slack = _slack(counts, part[0], reach, problem)
                counts, part = _above(z, np.where(alive, problem.threshold - slack, np.inf).astype(z.dtype))
            yield neurons[alive], signs[alive], slack[alive], counts[alive], part

    *columns, parts = zip(*in_chunks(work, width or problem.width, rows), strict=True)
    neurons, signs, slack, counts = map(np.concatenate, columns)
    return Screen(neurons, signs, join(counts, list(parts)), slack)


def _slack(
    counts: NDArray[np.int64], points: NDArray[np.uint16], reach: NDArray[np.float64], problem: Problem
) -> NDArray[np.float64]:
    """|reach| over the points on which each row fires, and more than the band in which rounding decides."""
    rows = np.repeat(np.arange(len(counts)), counts)
    slack = np.sqrt(np.bincount(rows, reach[points] ** 2, minlength=len(counts)))
    return np.maximum(slack, 4 * problem.band)


def _above(z: NDArray, lowest: NDArray) -> tuple[NDArray[np.int64], Part]:
    above = z > lowest[:, None]
    places = np.flatnonzero(above)
    return np.count_nonzero(above, axis=1), ((places % z.shape[1]).astype(np.uint16), z.ravel()[places])
