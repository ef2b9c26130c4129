"""Every neuron on every point at every iteration: what Brand, Peng, Song & Weinstein (arXiv 2006.11648) pay, on BLAS.

The baseline and the oracle of the other engines: m n d operations an iteration, in chunks that fit a cache.
"""

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from .coefficients import add_step, shift_rows
from .pairs import ROWS, Pairs, Part, join
from .problem import Problem
from .screen import fired_among, rows_in_cache
from .threads import Chunk, in_chunks
from .weights import fill_rows, initial_signs

__all__ = ["Dense"]


class Dense:
    """Weights of `neurons` kept as a matrix; their products with all points are computed anew at each iteration."""

    def __init__(self, problem: Problem, neurons: NDArray[np.int64] | None = None) -> None:
        self.problem = problem
        self.neurons = np.arange(problem.width) if neurons is None else neurons
        self.signs = initial_signs(problem.seed, self.neurons)
        self.weights = np.empty((len(self.neurons), problem.features), problem.dtype)

        def draw(chunks: Iterable[Chunk]) -> Iterator[None]:
            for first, last in chunks:
                yield fill_rows(problem.exact.seed, self.neurons[first:last], self.weights[first:last])

        in_chunks(draw, len(self.neurons), ROWS)
        self.moved = Pairs.none(len(self.neurons), problem.dtype)
        self.work: Counter[str] = Counter()

    def fired(self) -> Pairs:
        problem, rows, n = self.problem, rows_in_cache(self.problem), len(self.problem)

        counts = np.empty(len(self.neurons), np.int64)

        def work(chunks: Iterable[Chunk]) -> Iterator[Part]:
            buffer = np.empty((rows, n), problem.dtype)
            for first, last in chunks:
                z = buffer[: last - first]
                np.dot(self.weights[first:last], problem.points.T, out=z)
                neurons, signs = self.neurons[first:last], self.signs[first:last]
                yield fired_among(z, neurons, signs, self.moved, first, problem.exact, counts[first:last])

        self.work["multiply_adds"] += len(self.neurons) * n * problem.features
        return join(counts, in_chunks(work, len(self.neurons), rows))

    def move(self, fired: Pairs, step: NDArray[np.float64]) -> None:
        problem, rounded = self.problem, step.astype(self.problem.dtype)

        def work(chunks: Iterable[Chunk]) -> Iterator[None]:
            for first, last in chunks:
                shift_rows(
                    fired,
                    first,
                    rounded,
                    self.signs[first:last],
                    problem.dtype.type(problem.scale),
                    problem.points,
                    self.weights[first:last],
                )
                yield None

        in_chunks(work, len(self.neurons), ROWS)
        self.moved = add_step(self.moved, fired, rounded)
        self.work["multiply_adds"] += len(fired.points) * problem.features

    def coefficients(self) -> Pairs:
        return self.moved
