"""How far to go: from the residual f - y to the coefficients g of one step, w_r -= m^-1/2 a_r sum_{i in S_r} g_i x_i."""

from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from .solvers import SolverName, System, cholesky, sketched

__all__ = ["GaussNewton", "GradientDescent", "LevenbergMarquardt", "Method", "Rule", "make_rule"]

Method = Literal["gauss-newton", "levenberg-marquardt", "gradient-descent"]


class Rule(Protocol):
    damping: float  # of the last step, in units of the Gram matrix's mean diagonal

    def wants_gram(self) -> bool:
        """Whether the next step needs the Gram matrix."""
        ...

    def step(self, system: System, residual: NDArray[np.float64]) -> NDArray[np.float64]: ...

    def accept(self, before: float, after: float) -> bool:
        """Told the losses around the last step, decide whether to keep it."""
        ...

    def exhausted(self) -> bool:
        """Whether no further step can lower the loss."""
        ...


class GaussNewton:
    """g = (G + ridge I)^-1 (f - y) (arXiv 2208.04508, algorithm 1); every step is kept."""

    def __init__(self, solver: SolverName, ridge: float) -> None:
        self.solver, self.damping = solver, ridge

    def wants_gram(self) -> bool:
        return self.solver == "cholesky"

    def step(self, system: System, residual: NDArray[np.float64]) -> NDArray[np.float64]:
        solve = cholesky if self.solver == "cholesky" else sketched
        return solve(system, residual, self.damping * system.diagonal.mean())

    def accept(self, before: float, after: float) -> bool:
        return True

    def exhausted(self) -> bool:
        return False


class LevenbergMarquardt(GaussNewton):
    """Gauss-Newton with a ridge that follows how well the linear model foretold the loss; steps that raise it are undone.

    The ridge changes by the rule of H. B. Nielsen, Damping parameter in Marquardt's method (1999).
    """

    LEAST, MOST = 1e-10, 1e10

    def __init__(self, solver: SolverName, ridge: float) -> None:
        super().__init__(solver, ridge)
        self.least = max(ridge, self.LEAST)
        self.next = max(ridge, 1e-3)
        self.growth = 2.0
        self.foretold = 0.0

    def step(self, system: System, residual: NDArray[np.float64]) -> NDArray[np.float64]:
        self.damping = self.next
        step = super().step(system, residual)
        left = self.damping * system.diagonal.mean() * step  # f - y - G g, as (G + ridge I) g = f - y
        self.foretold = 0.5 * float(left @ left)
        return step

    def accept(self, before: float, after: float) -> bool:
        kept = after < before
        if kept:
            foretold = max(
                before - self.foretold, before - after
            )  # a gain beyond what was foretold counts as all of it
            gain = (before - after) / foretold
            self.next = max(self.damping * max(1 / 3, 1 - (2 * gain - 1) ** 3), self.least)
            self.growth = 2.0
        else:
            self.next = self.damping * self.growth
            self.growth *= 2
        return kept

    def exhausted(self) -> bool:
        return self.next > self.MOST


class GradientDescent:
    """g = rate (f - y), the rate 1 / lambda_max(G) of the start: the most that overshoots in no direction of a fixed G."""

    damping = 0.0

    def __init__(self) -> None:
        self.rate = 0.0

    def wants_gram(self) -> bool:
        return self.rate == 0

    def step(self, system: System, residual: NDArray[np.float64]) -> NDArray[np.float64]:
        if self.rate == 0:
            largest = float(np.linalg.eigvalsh(system.gram)[-1])
            if not largest > 0:
                raise system.singular()
            self.rate = 1 / largest
        return self.rate * residual

    def accept(self, before: float, after: float) -> bool:
        return True

    def exhausted(self) -> bool:
        return False


def make_rule(method: Method, solver: SolverName, ridge: float) -> Rule:
    if method == "gradient-descent":
        return GradientDescent()
    return (GaussNewton if method == "gauss-newton" else LevenbergMarquardt)(solver, ridge)
