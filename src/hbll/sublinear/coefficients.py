"""How far every neuron has moved: w_r = w_r(0) - m^-1/2 a_r sum_i A_ri x_i, with A as sparse as the pairs that ever
fired.
"""

from collections.abc import Iterable, Iterator

import numpy as np
from numba import njit
from numpy.typing import NDArray

from .pairs import ROWS, Pairs, Part, join
from .threads import Chunk, in_chunks

__all__ = ["add_step", "shift_rows"]


@njit(nogil=True, cache=True)
def _merge_rows(before, fired, step, first, last, counts, points, values):
    """Rows first .. last - 1 of before + step on the fired pairs. Returns the number of pairs."""
    total = 0
    for row in range(first, last):
        start = total
        p, p_stop = before.starts[row], before.starts[row + 1]
        q, q_stop = fired.starts[row], fired.starts[row + 1]
        while p < p_stop or q < q_stop:
            i = np.int64(before.points[p]) if p < p_stop else np.int64(1 << 16)
            j = np.int64(fired.points[q]) if q < q_stop else np.int64(1 << 16)
            points[total] = min(i, j)
            values[total] = 0
            if i <= j:
                values[total] += before.values[p]
                p += 1
            if j <= i:
                values[total] += step[j]
                q += 1
            total += 1
        counts[row - first] = total - start
    return total


def add_step(before: Pairs, fired: Pairs, step: NDArray) -> Pairs:
    """A_ri + step_i on the pairs that fire; `step` (n,) has the data type of the values."""

    counts = np.empty(len(before.starts) - 1, np.int64)

    def work(chunks: Iterable[Chunk]) -> Iterator[Part]:
        for first, last in chunks:
            most = int(before.starts[last] - before.starts[first] + fired.starts[last] - fired.starts[first])
            points, values = np.empty(most, np.uint16), np.empty(most, before.values.dtype)
            total = _merge_rows(before, fired, step, first, last, counts[first:last], points, values)
            yield points[:total], values[:total]

    return join(counts, in_chunks(work, len(counts), ROWS))


@njit(nogil=True, cache=True)
def shift_rows(pairs, first, step, signs, scale, points, weights):
    """weights[q] -= scale a_q sum_i c_i x_i over the pairs of row first + q, where c_i is the pair's value, or step_i
    if given.
    """
    for row in range(weights.shape[0]):
        for p in range(pairs.starts[first + row], pairs.starts[first + row + 1]):
            i = pairs.points[p]
            factor = scale * signs[row] * (step[i] if step.shape[0] else pairs.values[p])
            for k in range(points.shape[1]):
                weights[row, k] -= factor * points[i, k]
