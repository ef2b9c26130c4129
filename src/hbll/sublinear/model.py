"""A trained network: the seed of its weights, and how far the neurons that fired have moved. No weight is stored."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from .coefficients import shift_rows
from .pairs import Pairs
from .problem import Problem, unit_rows
from .screen import rows_in_cache
from .threads import Chunk, in_chunks, thread_count
from .weights import initial_rows, initial_signs

__all__ = ["Model"]


@njit(nogil=True, cache=True)
def _add_outputs(z, signs, threshold, outputs):
    for row in range(z.shape[0]):
        for j in range(z.shape[1]):
            outputs[j] += signs[row] * max(np.float64(z[row, j]) - threshold, 0.0)


@dataclass(frozen=True)
class Model:
    """What `fit` returns. For several targets each has a network of its own, grown from the same initial weights."""

    problem: Problem = field(repr=False)
    alive: NDArray[np.int64] = field(repr=False)  # neurons that fired on some training point at the start, ascending
    moved: list[Pairs] = field(repr=False)  # A_ri of w_r(0) - m^-1/2 a_r sum_i A_ri x_i: per target a row per alive r
    one_target: bool  # y was a vector
    engine: str
    start: dict[str, Any]  # loss and work before the first iteration
    history: list[dict[str, Any]] = field(repr=False)  # one entry per iteration
    converged: bool  # every target's loss is at most the tolerance

    def predict(self, points: ArrayLike) -> NDArray[np.float64]:
        """f at new points (q, d), scaled to unit norm like those of the fit: (q,), or (q, t) where y was (n, t).

        The weights are drawn again from the seed, chunk by chunk: memory for some thousand neurons, m d (1 + q)
        operations. Raises ValueError for points that are not finite, of zero norm, or of other than d features.
        """
        rows = unit_rows(points, "X")
        if rows.shape[1] != self.problem.features:
            raise ValueError(f"X has {rows.shape[1]} features, but the network was fitted on {self.problem.features}")
        new = rows.astype(self.problem.dtype)
        size = min(rows_in_cache(self.problem), 4096)

        def work(chunks: Iterable[Chunk]) -> Iterator[NDArray[np.float64]]:
            for first, last in chunks:
                yield self._outputs(np.arange(first, last), new)

        total = np.zeros((len(self.moved), len(new)))
        held = max(2 * thread_count(), (1 << 22) // total.size)  # chunks whose outputs are kept at a time
        batch = held * size
        for first in range(0, self.problem.width, batch):
            count = min(batch, self.problem.width - first)

            def shifted(chunks: Iterable[Chunk], first: int = first) -> Iterable[NDArray[np.float64]]:
                return work((first + low, first + high) for low, high in chunks)

            for outputs in in_chunks(shifted, count, size):  # in order: the sum does not depend on the threads
                total += outputs
        total *= self.problem.scale
        return total[0] if self.one_target else total.T

    def weights(self, neurons: ArrayLike, target: int = 0) -> NDArray:
        """The present first-layer weights of `neurons` (r,) in one target's network, shape (r, d).

        Raises ValueError unless they are whole numbers within 0..width-1.
        """
        chosen, width = np.asarray(neurons), self.problem.width
        whole = chosen.dtype.kind in "iu" or not chosen.size
        if chosen.ndim != 1 or not whole or ((chosen < 0) | (chosen >= width)).any():
            raise ValueError(f"neurons are (r,) whole numbers within 0..{width - 1}; got {neurons!r}")
        chosen = chosen.astype(np.int64)
        rows = initial_rows(self.problem.seed, chosen, self.problem.features, self.problem.dtype)
        for q in np.flatnonzero(np.isin(chosen, self.alive)):
            place = int(np.searchsorted(self.alive, chosen[q]))
            self._shift(self.moved[target], place, chosen[q : q + 1], rows[q : q + 1])
        return rows

    def _shift(self, moved: Pairs, first: int, neurons: NDArray[np.int64], rows: NDArray) -> None:
        """Move the initial `rows` of `neurons`, which are alive[first] and the ones after it."""
        scale = self.problem.dtype.type(self.problem.scale)
        signs = initial_signs(self.problem.seed, neurons)
        none = np.empty(0, self.problem.dtype)
        shift_rows(moved, first, none, signs, scale, self.problem.points, rows)

    def _outputs(self, neurons: NDArray[np.int64], new: NDArray) -> NDArray[np.float64]:
        """sum_r a_r max(<w_r, x> - b, 0) over consecutive neurons, of every target at every new point: (t, q)."""
        problem = self.problem
        rows = initial_rows(problem.seed, neurons, problem.features, problem.dtype)
        signs = initial_signs(problem.seed, neurons)
        outputs = np.zeros((len(self.moved), len(new)))
        low, high = np.searchsorted(self.alive, [neurons[0], neurons[-1] + 1])
        alive = self.alive[low:high]
        dead = np.ones(len(neurons), np.bool_)
        dead[alive - neurons[0]] = False
        self._add(rows[dead], signs[dead], new, outputs[0])
        outputs[1:] = outputs[0]
        for target, moved in enumerate(self.moved):
            shifted = rows[~dead]
            self._shift(moved, int(low), alive, shifted)
            self._add(shifted, signs[~dead], new, outputs[target])
        return outputs

    def _add(self, rows: NDArray, signs: NDArray[np.int8], new: NDArray, outputs: NDArray[np.float64]) -> None:
        for first in range(0, len(new), 1024):
            z = rows @ new[first : first + 1024].T
            _add_outputs(z, signs, self.problem.threshold, outputs[first : first + 1024])
