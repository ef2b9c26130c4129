"""Solve G g = r for the Gram matrix G = J J^T = K o C / m of the network's Jacobian, plus a ridge."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy import linalg
from scipy.sparse.linalg import LinearOperator, cg

from .pairs import ROWS, Pairs, Tally
from .problem import Problem
from .threads import Chunk, in_chunks, one_blas_thread

__all__ = ["SolverName", "System", "cholesky", "sketched"]

SolverName = Literal["cholesky", "sketch"]

SKETCH = 4  # columns of the sketch per point: its Gram matrix is then within about 1 / sqrt(4) of G, in relative terms
PRECISION = 1e-12  # of the conjugate gradients' residual, relative


@dataclass(frozen=True)
class System:
    """The Jacobian at the present weights, as the pairs that fire. Row (i) holds m^-1/2 a_r x_i where r fires on i."""

    problem: Problem
    fired: Pairs
    tally: Tally

    def __len__(self) -> int:
        return len(self.problem)

    @cached_property
    def diagonal(self) -> NDArray[np.float64]:
        """G_ii = |S_i| / m, as the points have unit norm."""
        shared = self.tally.shared  # C_ii = |S_i|
        counts = np.bincount(self.fired.points, minlength=len(self)) if shared is None else np.diagonal(shared)
        return counts / self.problem.width

    @cached_property
    def gram(self) -> NDArray[np.float64]:
        assert self.tally.shared is not None
        return self.problem.exact.gram * self.tally.shared / self.problem.width

    def singular(self) -> ValueError:
        unseen = np.flatnonzero(self.diagonal == 0)
        why = (
            f"no neuron fires on point {unseen[0]} ({len(unseen)} such points), so that its output cannot change"
            if len(unseen)
            else "points coincide, or too few neurons tell them apart"
        )
        return ValueError(
            f"the Gram matrix is singular: {why}; raise width, lower kappa, set a ridge, or use levenberg-marquardt"
        )


def cholesky(system: System, residual: NDArray[np.float64], ridge: float) -> NDArray[np.float64]:
    """g with (G + ridge I) g = residual, exactly. Costs n^3 / 3. Raises ValueError where the matrix is singular."""
    matrix = system.gram.copy()
    matrix[np.diag_indices_from(matrix)] += ridge
    with one_blas_thread(len(system)):
        try:
            # The transpose of a symmetric matrix is itself, in the order of columns that LAPACK need not copy.
            factor, lower = linalg.cho_factor(matrix.T, lower=True, overwrite_a=True, check_finite=False)
        except linalg.LinAlgError:
            raise system.singular() from None
        # Rounding can let a singular matrix pass: then a pivot is no more than the rounding of the largest.
        pivots = np.diagonal(factor) ** 2
        if pivots.min() <= len(system) * np.finfo(np.float64).eps * pivots.max():
            raise system.singular()
        return np.asarray(linalg.cho_solve((factor, lower), residual, check_finite=False))


@njit(nogil=True, cache=True)
def _gram_times(fired, gram, vector, first, last, product):
    for row in range(first, last):
        for p in range(fired.starts[row], fired.starts[row + 1]):
            i = fired.points[p]
            for q in range(fired.starts[row], fired.starts[row + 1]):
                product[i] += gram[i, fired.points[q]] * vector[fired.points[q]]


def gram_times(system: System, vector: NDArray[np.float64]) -> NDArray[np.float64]:
    """G v without G: J (J^T v), neuron by neuron. Costs sum_r |S_r|^2."""

    def work(chunks: Iterable[Chunk]) -> Iterator[NDArray[np.float64]]:
        for first, last in chunks:
            product = np.zeros(len(system))
            _gram_times(system.fired, system.problem.exact.gram, vector, first, last, product)
            yield product

    return np.sum(in_chunks(work, len(system.fired.starts) - 1, ROWS), axis=0) / system.problem.width


class _Operator(LinearOperator):
    def __init__(self, n: int, times: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> None:
        super().__init__(np.dtype(np.float64), (n, n))
        self._times = times

    def _matvec(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        return self._times(x)


@njit(nogil=True, cache=True)
def _count_sketch(fired, buckets, signs, sketch):
    for row in range(buckets.shape[0]):
        for p in range(fired.starts[row], fired.starts[row + 1]):
            sketch[fired.points[p], buckets[row]] += signs[row]


def sketched(system: System, residual: NDArray[np.float64], ridge: float) -> NDArray[np.float64]:
    """The same g by conjugate gradients on J J^T, which is never formed (BPSW21, arXiv 2006.11648, section 4).

    The preconditioner is the Gram matrix of a sketched Jacobian: every neuron is thrown, with a random sign, into one
    of 4 n buckets (CountSketch), which keeps the factor x_i of the rows as it is, so that no operation in the
    features is needed.
    """
    n, rows = len(system), len(system.fired.starts) - 1
    rng = np.random.default_rng(rows)  # any will do; the same at each iteration
    sketch = np.zeros((n, SKETCH * n))
    _count_sketch(system.fired, rng.integers(0, SKETCH * n, rows), rng.choice([-1.0, 1.0], rows), sketch)
    estimate = system.problem.exact.gram * (sketch @ sketch.T) / system.problem.width
    try:
        factor = linalg.cho_factor(estimate + ridge * np.eye(n), lower=True, overwrite_a=True)
    except linalg.LinAlgError:
        raise system.singular() from None
    gram = _Operator(n, lambda vector: gram_times(system, vector) + ridge * vector)
    preconditioner = _Operator(n, lambda vector: np.asarray(linalg.cho_solve(factor, vector)))
    solution, failed = cg(gram, residual, rtol=PRECISION, M=preconditioner, maxiter=10 * n)
    if failed:
        raise system.singular()
    return solution
