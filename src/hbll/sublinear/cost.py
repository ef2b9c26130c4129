"""What each engine will cost: bytes, so that a fit too large is refused before it starts; seconds, so that `auto` picks.

Both follow from a look at the neurons: a pilot of the first 4096 before anything large is allocated, all of them
after the screen.
"""

import math
from dataclasses import dataclass

import numpy as np

from .engine import EngineName
from .problem import Problem
from .screen import Screen, rows_in_cache

__all__ = ["Forecast", "dense_operations", "forecast"]

# Nanoseconds on one thread, float32, read off timings of the phases on one x86-64 machine; only their ratios decide.
PRODUCT = 0.022  # a multiply-add inside BLAS
SCAN = 1.0  # one product <w_r, x_j> against the threshold
ROW = 40.0  # a neuron's bookkeeping in the sparse passes
PAIR = 12.0  # a pair that fires: found, tallied, merged into the coefficients
SHIFT = 0.25  # a feature of a weight that a pair moves
ENTRY = 3.0  # a list's entry
LIST = 1.0  # a pair that fires, on an entry of its list
VISIT = 3.0  # a tree's node in a query
TOUCH = 9.0  # a tree's node in an update
LEAF = 1.5  # one S_r term of a leaf's change

CHUNK = 1280  # bytes that a chunk of the screen takes beside what fires in it


@dataclass(frozen=True)
class Forecast:
    """Expected counts at the start of the fit, and what they cost each engine per iteration."""

    alive: float  # neurons that fire on some point
    fired: float  # pairs that fire
    entries: float  # of the slack lists
    list_work: float  # sum_r |S_r| min(|L_r|, n / 8), as vector instructions follow long lists eight at a time
    seconds: dict[EngineName, float]  # per iteration on one thread, without the n x n solve that all share
    bytes: dict[EngineName, float]  # at the peak of a fit of one target


def forecast(problem: Problem, screened: Screen, looked_at: int) -> Forecast:
    """Extrapolate from a screen of the first `looked_at` neurons to all of them."""
    scale = problem.width / looked_at
    starts = screened.lists.starts
    above = np.concatenate([[0], np.cumsum(screened.lists.values > problem.threshold)])
    fires = np.diff(above[starts])
    alive, fired, entries = len(fires) * scale, int(above[-1]) * scale, len(screened.lists.points) * scale
    m, n, d, size = problem.width, len(problem), problem.features, problem.dtype.itemsize
    list_work = float(fires @ np.minimum(np.diff(starts), n / 8)) * scale
    visited = n * _paths(fired / n, m)
    touched = n * _paths(alive, m)

    def matrix(rows: float) -> float:
        return size / 4 * rows * n * (d * PRODUCT + SCAN) + rows * ROW / 4 + fired * (PAIR + d * SHIFT)

    nanoseconds: dict[EngineName, float] = {
        "dense": matrix(m),
        "compact": matrix(alive),
        "slack": alive * ROW + entries * ENTRY + list_work * LIST + fired * PAIR,
        "tree": visited * VISIT + touched * TOUCH + n * fired * LEAF + m * ROW / 4 + fired * PAIR,
    }
    pairs = 2 * (2 + size)  # an entry of the fired pairs, and its copy while they are joined
    common = n * n * (8 + size + 4 * 4) + 3 * pairs * fired
    screen_bytes = 33 * alive + 2 * (2 + size) * entries + CHUNK * m / rows_in_cache(problem)
    storage: dict[EngineName, float] = {
        "dense": m * (d * size + 8 + 1 + 3 * 8) + common,
        "compact": alive * (d * size + 8 + 1 + 3 * 8) + screen_bytes + common,
        "slack": alive * 58 + entries * (2 + 2 * size) + screen_bytes + common,
        "tree": m * (2 * n * size + 8 + 1 + 3 * 8) + common,
    }
    return Forecast(alive, fired, entries, list_work, {k: v * 1e-9 for k, v in nanoseconds.items()}, storage)


def _paths(leaves: float, m: int) -> float:
    """Nodes on the paths from `leaves` random leaves of m to the root: all levels above, then a chain for each leaf."""
    if leaves < 1:
        return 1.0
    return min(2.0 * m, leaves * (2 + math.log2(m / leaves))) if m > 1 else 1.0


def dense_operations(problem: Problem) -> int:
    """m n d + n^3 / 3: an iteration of the dense baseline (BPSW21, arXiv 2006.11648)."""
    return problem.width * len(problem) * problem.features + len(problem) ** 3 // 3
