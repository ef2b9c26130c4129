"""One target's training: ask the engine who fires, ask the rule how far to go, tell the engine to follow."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .cost import dense_operations
from .engine import Engine
from .pairs import Pairs, Tally, tally
from .problem import Problem
from .rules import Rule
from .solvers import System

__all__ = ["LARGEST", "Run", "descend"]

LARGEST = 1e18  # of a target and of a step: their squares stay within float32


@dataclass(frozen=True)
class Run:
    alive: NDArray[np.int64]  # neurons that fired at the start
    moved: Pairs  # a row per alive neuron: the coefficients of its move
    start: dict[str, Any]  # what was true, and done, before the first iteration
    history: list[dict[str, Any]]
    loss: float


def descend(
    problem: Problem, engine: Engine, target: NDArray[np.float64], rule: Rule, max_iter: int, tol: float
) -> Run:
    """Lower the loss 1/2 sum (f - y)^2 until it is at most tol; see training.fit for what is recorded."""
    began = time.perf_counter()
    fired, now = _look(problem, engine, rule)
    loss = _loss(now.outputs, target)
    at_start = np.flatnonzero(np.diff(fired.starts))
    start = {"loss": loss, "seconds": time.perf_counter() - began, "fired": len(fired.points), "alive": now.alive}
    start |= engine.work
    history: list[dict[str, Any]] = []
    while loss > tol and len(history) < max_iter and not rule.exhausted():
        began = time.perf_counter()
        before = engine.work.copy()
        entry = {"fired": len(fired.points), "alive": now.alive}
        step = rule.step(System(problem, fired, now), now.outputs - target)
        if not np.abs(step).max() < LARGEST:
            raise ValueError(
                f"the step of iteration {len(history) + 1} reaches {np.abs(step).max():.1e}: points almost coincide; "
                "use levenberg-marquardt, or set a ridge"
            )
        engine.move(fired, step)
        next_fired, trial = _look(problem, engine, rule)
        trial_loss = _loss(trial.outputs, target)
        accepted = rule.accept(loss, trial_loss)
        if accepted:
            fired, now, loss = next_fired, trial, trial_loss
        else:
            engine.move(fired, -step)
        entry |= {"loss": loss, "seconds": time.perf_counter() - began, "accepted": accepted, "damping": rule.damping}
        done = engine.work - before
        entry |= done
        solve = len(problem) ** 3 // 3 if now.shared is not None else 0
        entry["operations"] = done.total() - done["rows_relisted"] + trial.work + solve
        entry["dense_operations"] = dense_operations(problem)
        history.append(entry)
    moved = engine.coefficients()
    kept = Pairs(np.append(moved.starts[at_start], moved.starts[-1]), moved.points, moved.values)
    return Run(engine.neurons[at_start], kept, start, history, loss)


def _look(problem: Problem, engine: Engine, rule: Rule) -> tuple[Pairs, Tally]:
    fired = engine.fired()
    return fired, tally(fired, engine.signs, problem, with_shared=rule.wants_gram())


def _loss(outputs: NDArray[np.float64], target: NDArray[np.float64]) -> float:
    residual = outputs - target
    return 0.5 * float(residual @ residual)
