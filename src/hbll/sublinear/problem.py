"""What is trained: n unit points, a network of m shifted-ReLU neurons, and the one rule that says whether a neuron
fires.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, DTypeLike, NDArray

from .threads import one_blas_thread
from .weights import fill_row

__all__ = ["Exact", "Problem", "settle", "unit_rows"]


class Exact(NamedTuple):
    """What the compiled kernels need to decide `z > threshold`, also where rounding alone would decide it."""

    seed: np.uint64
    points: NDArray  # (n, d), unit rows
    gram: NDArray[np.float64]  # (n, n), their products
    threshold: float
    scale: float  # 1 / sqrt(m)
    low: np.floating  # a z at or below `low` does not fire, one above `high` does;
    high: np.floating  # between them `settle` decides


@dataclass(frozen=True)
class Problem:
    """f(x) = m^-1/2 sum_r a_r max(<w_r, x> - b, 0) on fixed training points (arXiv 2208.04508, section 2).

    w_r ~ N(0, I) and a_r in {-1, +1} are functions of the seed (see weights.py); b = sqrt(2 kappa ln m), rounded once
    to the data type, is the same number wherever it is compared.
    """

    points: NDArray  # (n, d) of the data type, unit rows
    gram: NDArray  # (n, n) of the data type: K = X X^T
    width: int
    seed: int
    exact: Exact

    @classmethod
    def of(cls, points: NDArray[np.float64], width: int, kappa: float, seed: int, dtype: DTypeLike) -> "Problem":
        kind = np.float32 if np.dtype(dtype) == np.float32 else np.float64
        threshold = float(kind(math.sqrt(2 * kappa * math.log(width))))
        rounded = np.ascontiguousarray(points, kind)
        with one_blas_thread(len(points)):
            gram = rounded.astype(np.float64) @ rounded.T.astype(np.float64)
        # Every engine computes z in its own order of operations; the band is wider than their rounding errors.
        band = float(np.finfo(kind).eps) * (64 + 4 * math.sqrt(points.shape[1])) * max(1.0, threshold)
        exact = Exact(
            seed=np.uint64(seed),
            points=rounded,
            gram=gram,
            threshold=threshold,
            scale=1 / math.sqrt(width),
            low=kind(threshold - band),
            high=kind(threshold + band),
        )
        return cls(rounded, gram.astype(kind), width, seed, exact)

    @property
    def dtype(self) -> np.dtype:
        return self.points.dtype

    @property
    def scale(self) -> float:
        return self.exact.scale

    @property
    def threshold(self) -> float:
        return self.exact.threshold

    @property
    def band(self) -> float:
        """Half the width of the interval around the threshold in which `settle` decides."""
        return (float(self.exact.high) - float(self.exact.low)) / 2

    @property
    def share(self) -> float:
        """Probability that a neuron fires on a point at the start: the Gaussian tail beyond the threshold."""
        return math.erfc(self.threshold / math.sqrt(2)) / 2

    def __len__(self) -> int:
        return len(self.points)

    @property
    def features(self) -> int:
        return self.points.shape[1]


@njit(nogil=True)
def settle(exact, neuron, sign, point, points, coefficients, first, last):
    """Whether the neuron fires on the point, from first principles: the same answer whatever the engine and the
    threads.

    In float64 and a fixed order, <w_r(0), x> - m^-1/2 a_r sum_i A_ri K_ij, where `points` and `coefficients` hold the
    neuron's A_ri at first .. last - 1.
    """
    weights = np.empty(exact.points.shape[1])
    fill_row(exact.seed, neuron, weights)
    z = 0.0
    for k in range(weights.shape[0]):
        z += weights[k] * exact.points[point, k]
    moved = 0.0
    for q in range(first, last):
        if coefficients[q] != 0:
            moved += coefficients[q] * exact.gram[points[q], point]
    return z - exact.scale * sign * moved > exact.threshold


def unit_rows(points: ArrayLike, name: str) -> NDArray[np.float64]:
    """Rows scaled to unit length in float64, shape (n, d).

    Raises ValueError where the array is not two-dimensional, not finite, empty, or has a row of zero norm.
    """
    rows = np.asarray(points, np.float64)
    if rows.ndim != 2 or 0 in rows.shape:
        raise ValueError(f"{name} has shape {rows.shape}; (points, features) is needed, at least one of each")
    broken = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(broken):
        raise ValueError(f"{name} holds NaN or infinity, first in row {broken[0]}")
    largest = np.abs(rows).max(axis=1, keepdims=True)
    zero = np.flatnonzero(largest == 0)
    if len(zero):
        raise ValueError(
            f"row {zero[0]} of {name} has zero norm, but the method sees directions only; append a constant feature"
        )
    rows = rows / largest  # so that the squares neither overflow nor vanish
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
