"""Time the engines side by side on the same problem, in one process and in turns, so that a busy machine slows them
alike.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .engine import EngineName
from .training import fit

__all__ = ["Timing", "random_task", "time_engines"]


@dataclass(frozen=True)
class Timing:
    """Of one engine; every time is the best of the repeats, in seconds."""

    engine: EngineName
    iteration: float  # mean over the iterations of a fit
    whole: float  # the fit, with what comes before the first iteration
    operations: float  # mean over the iterations
    loss: float


def random_task(points: int, features: int, seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Gaussian points and targets."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((points, features)), rng.standard_normal(points)


def time_engines(
    X: NDArray[np.float64],
    y: NDArray[np.float64],
    width: int,
    kappa: float,
    engines: Sequence[EngineName],
    iterations: int,
    repeats: int,
    seed: int = 0,
) -> list[Timing]:
    """Fit by Gauss-Newton in float32, `iterations` steps whatever the loss; the first fit of each engine compiles,
    uncounted.
    """
    for engine in engines:
        fit(X, y, min(width, 4096), kappa, engine, max_iter=2, tol=0, seed=seed)
    best: dict[EngineName, Timing] = {}
    for _ in range(repeats):
        for engine in engines:
            began = time.perf_counter()
            model = fit(X, y, width, kappa, engine, max_iter=iterations, tol=0, seed=seed)
            whole = time.perf_counter() - began
            seconds = float(np.mean([entry["seconds"] for entry in model.history]))
            operations = float(np.mean([entry["operations"] for entry in model.history]))
            past = best.get(engine)
            best[engine] = Timing(
                engine,
                min(seconds, past.iteration) if past else seconds,
                min(whole, past.whole) if past else whole,
                operations,
                model.history[-1]["loss"],
            )
    return [best[engine] for engine in engines]
