"""The method as a scikit-learn regressor."""

import warnings
from typing import Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data  # pyrefly: ignore[missing-module-attribute]

from .engine import EngineName
from .model import Model
from .rules import Method
from .solvers import SolverName
from .training import fit

__all__ = ["SublinearRegressor"]


class SublinearRegressor(MultiOutputMixin, RegressorMixin, BaseEstimator):
    """A wide shifted-ReLU network, fitted by hbll.sublinear.fit to standardised targets.

    A constant feature is appended to X before the rows are scaled to unit norm, so that no row is zero and its length
    is not lost; scale the features to about unit size first, as with any network. The parameters are those of `fit`;
    tol bounds 1/2 sum of squares over the training points of each target, in units of the target's variance. The
    defaults differ where a regressor has to cope with any data: damped steps, float64, and kappa 0.4, which predicts
    better than 0.2 (docs/sublinear.md).

    Attributes: model_ (hbll.sublinear.Model), n_iter_, n_features_in_.
    """

    def __init__(
        self,
        width: int = 4096,
        kappa: float = 0.4,
        engine: EngineName | Literal["auto"] = "auto",
        method: Method = "levenberg-marquardt",
        max_iter: int = 100,
        tol: float = 1e-6,
        solver: SolverName = "cholesky",
        ridge: float = 0.0,
        dtype: Literal["float32", "float64"] = "float64",
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.width = width
        self.kappa = kappa
        self.engine = engine
        self.method = method
        self.max_iter = max_iter
        self.tol = tol
        self.solver = solver
        self.ridge = ridge
        self.dtype = dtype
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Train on X (n, d) and y (n,) or (n, t). Warns (ConvergenceWarning) where the loss is above tol at the end."""
        points, targets = validate_data(self, X, y, dtype=np.float64, multi_output=True, y_numeric=True)
        targets = np.asarray(targets, np.float64)
        self._mean = targets.mean(axis=0)
        spread = targets.std(axis=0)
        self._spread = np.where(spread > 0, spread, 1.0)
        self.model_: Model = fit(
            _with_constant(points),
            (targets - self._mean) / self._spread,
            self.width,
            kappa=self.kappa,
            engine=self.engine,
            method=self.method,
            max_iter=self.max_iter,
            tol=self.tol,
            seed=int(check_random_state(self.random_state).randint(2**31)),
            dtype=self.dtype,
            solver=self.solver,
            ridge=self.ridge,
        )
        self.n_iter_ = max(1, len(self.model_.history))
        if not self.model_.converged:
            warnings.warn(
                f"a target's loss is above tol = {self.tol:g} after {self.n_iter_} iterations: "
                "points may contradict each other, or the width be too small",
                ConvergenceWarning,
                stacklevel=2,
            )
        return self

    def predict(self, X: ArrayLike) -> NDArray[np.float64]:
        """Predictions (q,) or (q, t) at X (q, d)."""
        check_is_fitted(self)
        points = validate_data(self, X, dtype=np.float64, reset=False)
        return self.model_.predict(_with_constant(points)) * self._spread + self._mean


def _with_constant(points: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.column_stack([points, np.ones(len(points))])
