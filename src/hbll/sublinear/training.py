"""Train a wide shifted-ReLU network in time that does not grow with its weights (arXiv 2208.04508)."""

import math
import operator
import time
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from hbll.machine import machine_bytes, refuse_beyond

from .compact import Compact
from .cost import forecast
from .dense import Dense
from .descent import LARGEST, Run, descend
from .engine import ENGINES, Engine, EngineName
from .model import Model
from .problem import Problem, unit_rows
from .rules import Method, make_rule
from .screen import Screen, screen
from .slack import Slack, expected_reach
from .solvers import SolverName
from .tree import Tree

__all__ = ["fit"]

PILOT = 4096  # neurons looked at before memory is reserved
MOST_POINTS = 2**16 - 1  # a point's number is stored in two bytes


def fit(
    X: ArrayLike,
    y: ArrayLike,
    width: int,
    kappa: float = 0.2,
    engine: EngineName | Literal["auto"] = "auto",
    method: Method = "gauss-newton",
    max_iter: int = 100,
    tol: float = 1e-10,
    seed: int = 0,
    dtype: DTypeLike = np.float32,
    solver: SolverName = "cholesky",
    ridge: float = 0.0,
) -> Model:
    """Fit f(x) = m^-1/2 sum_r a_r max(<w_r, x> - b, 0), b = sqrt(2 kappa ln m), to y by full-batch training of the w_r.

    X (n, d): rows are scaled to unit norm, as the method needs; append a constant feature to keep their length.
    y (n,), or (n, t) for t targets, each with a network of its own from the same initial weights, on one screen.
    width: m. kappa: the larger, the fewer neurons fire, about m^(1 - kappa) of them on a point.

    engine: how the neurons that fire are found; all are exact and follow the same trajectory. "auto" foretells the
    costs after the screen and picks; see model.engine. method: "gauss-newton" (the paper's), "levenberg-marquardt"
    (damped where a step fails, for clustered points), "gradient-descent". solver: "cholesky", or "sketch" for
    BPSW21's preconditioned conjugate gradients. ridge is added to the Gram matrix, in units of its mean diagonal; it
    slows every step and does not move the optimum. dtype: float32 or float64, of the search and the weights; losses,
    outputs and the n x n solve are always float64.

    Training ends when the loss 1/2 sum (f - y)^2 of each target is at most tol, or after max_iter iterations
    (model.converged). It is the loss of the weights as the engine keeps them; what model.predict rebuilds from the
    coefficients of all steps is off by their rounding, some 1e-6 of |y| in float32: a tol below that needs float64.
    model.history has a dict per iteration: "loss" after it, summed over targets, and "losses";
    "seconds"; "fired" pairs and "alive" neurons before it; "accepted" and "damping"; the engine's counters;
    "operations", and "dense_operations" that the dense baseline (BPSW21) would have made.

    Raises ValueError for input that is not finite, rows of zero norm, lengths that differ, a Gram matrix that is
    singular, steps that grow beyond bounds, and for memory beyond the machine, foretold before it is reserved.
    """
    _check_choice("engine", engine, ("auto", *ENGINES))
    _check_choice("method", method, get_args(Method))
    _check_choice("solver", solver, get_args(SolverName))
    _check_choice("dtype", np.dtype(dtype).name, ("float32", "float64"))
    for name, value, least in [("width", width, 1), ("kappa", kappa, 0), ("max_iter", max_iter, 0), ("seed", seed, 0)]:
        _check_number(name, value, least)
    _check_number("tol", tol, 0)
    _check_number("ridge", ridge, 0)
    points = unit_rows(X, "X")
    targets = _targets(y, len(points))
    n = len(points)
    if n > MOST_POINTS:
        raise ValueError(f"X has {n} points, and at most {MOST_POINTS} can be fitted: each step solves an n x n system")
    refuse_beyond(n * n * (8 + 4 * 8.0), f"the Gram matrix of {n} points")
    problem = Problem.of(points, operator.index(width), float(kappa), operator.index(seed), dtype)

    began = time.perf_counter()
    reach = expected_reach(problem, targets) if engine in ("auto", "slack") else np.zeros(n)
    names = _affordable(problem, reach, engine)
    screened: Screen | None = None
    name = names[0]
    if engine in ("auto", "slack", "compact"):
        screened = screen(problem, reach if "slack" in names else np.zeros(n))
        if not len(screened.neurons):
            raise ValueError(f"none of {width} neurons fires on any of the {n} points; raise width or lower kappa")
        if engine == "auto":
            costs = forecast(problem, screened, problem.width).seconds
            name = min(names, key=lambda candidate: costs[candidate])
    screening = time.perf_counter() - began

    runs = []
    for target in targets.T:  # one after the other: only one engine is in memory
        rule = make_rule(method, solver, ridge)
        runs.append(descend(problem, _build(name, problem, screened), target, rule, max_iter, tol))
    return Model(
        problem=problem,
        alive=runs[0].alive,
        moved=[run.moved for run in runs],
        one_target=np.ndim(y) == 1,
        engine=name,
        start=_together([run.start for run in runs]) | {"screen_seconds": screening},
        history=_merged(runs),
        converged=all(run.loss <= tol for run in runs),
    )


def _affordable(problem: Problem, reach: NDArray[np.float64], engine: EngineName | Literal["auto"]) -> list[EngineName]:
    """The engines asked for that fit the machine's memory, foretold from a pilot; ValueError where none does."""
    looked_at = min(problem.width, PILOT)
    needed = forecast(problem, screen(problem, reach, looked_at), looked_at).bytes
    names: list[EngineName] = list(ENGINES) if engine == "auto" else [engine]
    cheapest = min(names, key=lambda name: needed[name])
    refuse_beyond(needed[cheapest], f"engine {cheapest!r} with width {problem.width} on {len(problem)} points")
    return [name for name in names if needed[name] <= machine_bytes()]


def _build(name: EngineName, problem: Problem, screened: Screen | None) -> Engine:
    if name == "tree":
        return Tree(problem)
    if name == "dense":
        return Dense(problem)
    assert screened is not None
    return Slack(problem, screened) if name == "slack" else Compact(problem, screened)


def _together(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Records of several targets as one: sums; the largest damping; accepted where all were."""
    rules = {"damping": max, "accepted": all}
    names = dict.fromkeys(name for entry in entries for name in entry)
    return {name: rules.get(name, sum)([entry[name] for entry in entries if name in entry]) for name in names}


def _merged(runs: list[Run]) -> list[dict[str, Any]]:
    """One history of several targets. A target that has ended adds its last loss and no work."""
    history = []
    for k in range(max(len(run.history) for run in runs)):
        losses = [run.history[min(k, len(run.history) - 1)]["loss"] if run.history else run.loss for run in runs]
        entry = _together([run.history[k] for run in runs if k < len(run.history)])
        history.append(entry | {"loss": sum(losses), "losses": losses})
    return history


def _targets(y: ArrayLike, points: int) -> NDArray[np.float64]:
    """y as (n, t) in float64."""
    targets = np.asarray(y, np.float64)
    if targets.ndim not in (1, 2) or targets.shape[0] != points or targets.size == 0:
        raise ValueError(
            f"y has shape {targets.shape}, but X has {points} points: ({points},) or ({points}, targets) is needed"
        )
    if not np.isfinite(targets).all():
        raise ValueError("y holds NaN or infinity")
    if np.abs(targets).max() > LARGEST:
        raise ValueError(f"y reaches {np.abs(targets).max():.1e}, and at most {LARGEST:g} can be fitted; scale it")
    return targets.reshape(points, -1)


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; one of {', '.join(choices)} is needed")


def _check_number(name: str, value: float, least: float) -> None:
    if not least <= value < math.inf:
        raise ValueError(f"{name} is {value}; a finite number of at least {least:g} is needed")
