"""Slack lists: search only the pairs that can fire, under a certificate, whatever the width and the features.

For an alive neuron r the list holds the points with z > b - R_r. As ||x_j|| = 1, a move of w_r by delta changes no
z_rj by more than ||delta||; while the length D_r of the path walked since the list was made stays within R_r (`left`
= R_r - D_r), no point outside it can fire. Beyond that, this one row is computed anew. A step changes z_rj by -m^-1/2
a_r sum_{i in S_r} g_i K_ij, and the length of the step is a by-product: ||delta w_r||^2 = sum_{j in S_r} g_j sum_{i
in S_r} g_i K_ij / m.
"""

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
from numba import njit
from numpy.typing import NDArray

from .pairs import ROWS, Pairs, Part, join
from .problem import Problem, settle
from .screen import Screen, rows_in_cache
from .threads import Chunk, in_chunks
from .weights import initial_rows

__all__ = ["Slack", "expected_reach"]

HAS_FIRED = 1e-37  # a change that came out as nothing: what fired stays listed, for the step may be undone


def expected_reach(problem: Problem, targets: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far a first Gauss-Newton step moves a neuron for each point it fires on, with a margin, shape (n,).

    f is near 0 at the start and G near the share of neurons that fire, so |g_i| is about |y_i| / share; `targets` is
    (n, t), and the farthest target counts. A wrong guess costs time (rows computed anew, or long lists), never
    exactness.
    """
    spread = np.abs(targets).max(axis=1) + 0.15 * np.abs(targets).mean()
    return 1.7 * spread * problem.scale / problem.share


@njit(nogil=True, cache=True)
def _fired_rows(neurons, signs, live, begins, lengths, points, z, changes, exact, first, last, counts, out, values):
    """Write the pairs that fire of rows first .. last - 1. Returns their number and the entries looked at.

    Unsigned places spare the compiler a test for negative ones at each access, here and below.
    """
    total = np.uint64(0)
    visited = 0
    for row in range(first, last):
        start = total
        if live[row]:
            begin = np.uint64(begins[row])
            end = begin + np.uint64(lengths[row])
            visited += lengths[row]
            doubtful = False
            for p in range(begin, end):  # branchless: the outcome of the comparison is hard to foresee
                out[total] = points[p]
                values[total] = z[p]
                total += np.uint64(z[p] > exact.low)
                doubtful |= (z[p] > exact.low) & (z[p] <= exact.high)
            if doubtful:
                total = start
                for p in range(begin, end):
                    if z[p] > exact.high or (
                        z[p] > exact.low
                        and settle(exact, neurons[row], signs[row], points[p], points, changes, begin, end)
                    ):
                        out[total] = points[p]
                        values[total] = z[p]
                        total += np.uint64(1)
        counts[row - first] = total - start
    return total, visited


@njit(nogil=True, cache=True)
def _move_rows(
    fired,
    step,
    weighted,
    signs,
    live,
    begins,
    lengths,
    points,
    z,
    changes,
    slack,
    left,
    walked,
    threshold,
    band,
    scale,
    first,
    last,
    u,
):
    """Follow the step on the lists of rows first .. last - 1; weighted[i, j] is step_i K_ij, and u (n,) scratch.

    Returns the multiply-adds and the rows with no slack left.
    """
    ended = []
    work = 0
    n = weighted.shape[0]
    one = np.uint64(1)
    for row in range(first, last):
        start, stop = np.uint64(fired.starts[row]), np.uint64(fired.starts[row + 1])
        live[row] = start != stop
        if not live[row]:
            continue
        begin = np.uint64(begins[row])
        end = begin + np.uint64(lengths[row])
        i = fired.points[start]
        if lengths[row] * 8 < n:
            work += (stop - start) * (end - begin)
            for p in range(begin, end):
                u[points[p]] = weighted[i, points[p]]
            for q in range(start + one, stop):
                i = fired.points[q]
                for p in range(begin, end):
                    u[points[p]] += weighted[i, points[p]]
        else:  # all points in their order cost less than an eighth of them one by one: vector instructions
            work += (stop - start) * np.uint64(n)
            for j in range(n):
                u[j] = weighted[i, j]
            for q in range(start + one, stop):
                i = fired.points[q]
                for j in range(n):
                    u[j] += weighted[i, j]
        for p in range(begin, end):
            z[p] -= scale * signs[row] * u[points[p]]
        square = 0.0
        p = begin
        for q in range(start, stop):
            i = fired.points[q]
            while points[p] != i:  # what fires is listed
                p += one
            changes[p] += step[i]
            if changes[p] == 0:
                changes[p] = HAS_FIRED
            square += np.float64(step[i]) * u[i]
        length = scale * np.sqrt(max(square, 0.0))
        left[row] -= length
        if left[row] < 0:
            ended.append(row)
            continue
        path = slack[row] - band - left[row]
        if walked[row] == 0 and 4 * length < path < 4 * left[row]:  # the steps are short by now: less slack will do
            walked[row] = path
            left[row] = path / 8
            slack[row] = left[row] + band
            kept = begin
            for p in range(begin, end):
                if z[p] > threshold - slack[row] or changes[p] != 0:
                    points[kept] = points[p]
                    z[kept] = z[p]
                    changes[kept] = changes[p]
                    kept += one
            lengths[row] = kept - begin
    return work, np.array(ended, np.int64)


class Slack:
    """Row q's list lies at begins[q] .. begins[q] + lengths[q] - 1 of three parallel arrays."""

    def __init__(self, problem: Problem, screened: Screen) -> None:
        self.problem = problem
        self.neurons, self.signs = screened.neurons, screened.signs
        lists = screened.lists
        self.begins, self.lengths = lists.starts[:-1].copy(), np.diff(lists.starts)
        self.points, self.z = lists.points, lists.values
        self.changes = np.zeros(len(self.z), problem.dtype)  # A_ri of the entries
        self.used = len(self.z)  # of these arrays; what lies behind is room for lists that grow
        self._make_room(self.used // 16)
        self.slack = screened.slack.copy()
        self.left = self.slack - problem.band  # of the slack, for the path still to walk
        self.walked = np.zeros(len(self.neurons))  # before the present list
        self.live = np.ones(len(self.neurons), np.bool_)  # fired on some point before the last step
        self.longest = self._longest()
        self.work: Counter[str] = Counter()

    def fired(self) -> Pairs:
        counts = np.empty(len(self.neurons), np.int64)

        def work(chunks: Iterable[Chunk]) -> Iterator[tuple[Part, int]]:
            most = self.longest + 1  # one to spare for the branchless writes
            points, values = np.empty(most, np.uint16), np.empty(most, self.problem.dtype)
            for first, last in chunks:
                total, visited = _fired_rows(
                    self.neurons,
                    self.signs,
                    self.live,
                    self.begins,
                    self.lengths,
                    self.points,
                    self.z,
                    self.changes,
                    self.problem.exact,
                    first,
                    last,
                    counts[first:last],
                    points,
                    values,
                )
                yield (points[:total].copy(), values[:total].copy()), visited

        parts, visited = zip(*in_chunks(work, len(self.neurons), ROWS), strict=True)
        self.work["entries_visited"] += sum(visited)
        return join(counts, list(parts))

    def move(self, fired: Pairs, step: NDArray[np.float64]) -> None:
        problem = self.problem
        rounded = step.astype(problem.dtype)
        weighted = rounded[:, None] * problem.gram  # g_i K_ij

        def work(chunks: Iterable[Chunk]) -> Iterator[tuple[np.unsignedinteger | int, NDArray]]:
            u = np.empty(len(problem), problem.dtype)
            for first, last in chunks:
                yield _move_rows(
                    fired,
                    rounded,
                    weighted,
                    self.signs,
                    self.live,
                    self.begins,
                    self.lengths,
                    self.points,
                    self.z,
                    self.changes,
                    self.slack,
                    self.left,
                    self.walked,
                    problem.threshold,
                    problem.band,
                    problem.dtype.type(problem.scale),
                    first,
                    last,
                    u,
                )

        operations, ended = zip(*in_chunks(work, len(self.neurons), ROWS), strict=True)
        self.work["multiply_adds"] += int(sum(operations))
        rows = np.concatenate(ended)
        if len(rows):
            self._list_anew(rows)

    def _list_anew(self, rows: NDArray[np.int64]) -> None:
        """New lists, with half the whole path's length as slack: so a path of any length ends a logarithm of lists."""
        problem = self.problem
        self.walked[rows] += self.slack[rows] - problem.band - self.left[rows]
        self.slack[rows] = np.maximum(self.walked[rows] / 2, 4 * problem.band)
        self.left[rows] = self.slack[rows] - problem.band

        def work(chunks: Iterable[Chunk]) -> Iterator[tuple]:
            for first, last in chunks:
                yield self._listed(rows[first:last])

        lists = in_chunks(work, len(rows), rows_in_cache(problem))
        counts, points, z, changes = map(np.concatenate, zip(*lists, strict=True))
        grown = counts > self.lengths[rows]  # the others stay where they are
        extra = counts * grown
        self.begins[rows[grown]] = (self.used + np.cumsum(extra) - extra)[grown]
        self.lengths[rows] = counts
        if self.used + extra.sum() > len(self.points):
            self._make_room(max(extra.sum(), self.used // 4))
        self.used += extra.sum()
        entries = self._entries(rows)
        self.points[entries], self.z[entries], self.changes[entries] = points, z, changes
        self.work["rows_relisted"] += len(rows)
        self.work["multiply_adds"] += 2 * len(rows) * len(problem) * problem.features
        if self.used > 4 * self.lengths.sum():
            self._close_gaps()
        self.longest = self._longest()

    def _longest(self) -> int:
        """Entries of the largest chunk of rows."""
        return int(np.add.reduceat(self.lengths, np.arange(0, len(self.lengths), ROWS)).max())

    def _listed(self, rows: NDArray[np.int64]) -> tuple[NDArray, NDArray[np.uint16], NDArray, NDArray]:
        """(length, points, z, changes) of the lists of `rows`, from weights made anew; what has moved stays listed."""
        problem = self.problem
        entries = self._entries(rows)
        moved = np.zeros((len(rows), len(problem)), problem.dtype)
        moved[np.repeat(np.arange(len(rows)), self.lengths[rows]), self.points[entries]] = self.changes[entries]
        weights = initial_rows(problem.seed, self.neurons[rows], problem.features, problem.dtype)
        weights -= (problem.scale * self.signs[rows]).astype(problem.dtype)[:, None] * (moved @ problem.points)
        z = weights @ problem.points.T
        lowest = (problem.threshold - self.slack[rows]).astype(problem.dtype)
        kept = (z > lowest[:, None]) | (moved != 0)
        places = np.flatnonzero(kept)
        points = (places % len(problem)).astype(np.uint16)
        return np.count_nonzero(kept, axis=1), points, z.ravel()[places], moved.ravel()[places]

    def _entries(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the entries of `rows` lie, row by row."""
        ends = np.cumsum(self.lengths[rows])
        return np.repeat(self.begins[rows] - (ends - self.lengths[rows]), self.lengths[rows]) + np.arange(ends[-1])

    def _make_room(self, entries: int) -> None:
        for name in ("points", "z", "changes"):
            array = getattr(self, name)
            larger = np.empty(self.used + entries, array.dtype)
            larger[: self.used] = array[: self.used]
            setattr(self, name, larger)

    def _close_gaps(self) -> None:
        kept = self._entries(np.arange(len(self.neurons)))
        self.points, self.z, self.changes = self.points[kept], self.z[kept], self.changes[kept]
        self.begins = np.cumsum(self.lengths) - self.lengths
        self.used = len(self.points)

    def coefficients(self) -> Pairs:
        self._close_gaps()
        held = self.changes != 0
        starts = np.concatenate([[0], np.cumsum(held)])[np.append(self.begins, len(held))]
        return Pairs(starts, self.points[held], self.changes[held])
