"""The network of arXiv 2208.04508 written out in float64 with full matrices: what every engine is held against."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
from numpy.typing import NDArray

from hbll.sublinear.problem import Problem, unit_rows
from hbll.sublinear.weights import initial_rows, initial_signs


@dataclass
class Oracle:
    """Full weights (m, d), all products, no shortcut."""

    problem: Problem
    weights: NDArray[np.float64]
    signs: NDArray[np.float64]

    @classmethod
    def of(cls, problem: Problem) -> "Oracle":
        neurons = np.arange(problem.width)
        rows = initial_rows(problem.seed, neurons, problem.features, np.dtype(np.float64))
        return cls(problem, rows, initial_signs(problem.seed, neurons).astype(np.float64))

    @property
    def points(self) -> NDArray[np.float64]:
        return self.problem.points.astype(np.float64)

    @property
    def z(self) -> NDArray[np.float64]:
        return self.weights @ self.points.T  # (m, n)

    @property
    def fires(self) -> NDArray[np.bool_]:
        return self.z > self.problem.threshold

    def outputs(self, points: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
        z = self.weights @ (self.points if points is None else points).T
        return self.signs @ np.maximum(z - self.problem.threshold, 0) / math.sqrt(self.problem.width)

    def jacobian(self) -> NDArray[np.float64]:
        """df_i / dw_r, shape (n, m d)."""
        rows = np.einsum("r,ri,ik->irk", self.signs, self.fires, self.points) / math.sqrt(self.problem.width)
        return rows.reshape(len(self.points), -1)

    def move(self, step: NDArray[np.float64]) -> None:
        shift = (self.fires * step) @ self.points
        self.weights -= self.signs[:, None] * shift / math.sqrt(self.problem.width)


@pytest.fixture(scope="session")
def oracle():
    return Oracle.of


@pytest.fixture(scope="session")
def make_problem():
    """Problem on seeded Gaussian points; `copies` of them repeat earlier ones."""

    def make(n=12, d=5, width=300, kappa=0.1, seed=0, dtype="float64", copies=0):
        points = np.random.default_rng(seed).standard_normal((n, d))
        if copies:
            points[-copies:] = points[:copies]
        return Problem.of(unit_rows(points, "X"), width, kappa, seed, dtype)

    return make


@pytest.fixture(scope="session")
def with_threshold():
    """The same problem with its threshold put elsewhere, for instance on a tie."""

    def move(problem, threshold):
        kind, band = problem.dtype.type, problem.band
        exact = problem.exact._replace(threshold=threshold, low=kind(threshold - band), high=kind(threshold + band))
        return replace(problem, exact=exact)

    return move


@pytest.fixture(scope="session")
def dense_matrix():
    """Pairs as a matrix (rows, n): their values, or True where there is a pair."""

    def expand(pairs, n, values=True):
        out = np.zeros((len(pairs.starts) - 1, n), float if values else bool)
        rows = np.repeat(np.arange(len(out)), np.diff(pairs.starts))
        out[rows, pairs.points] = pairs.values if values else True
        return out

    return expand
