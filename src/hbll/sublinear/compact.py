"""The neurons that are alive on every point, on BLAS: exact, because a dead neuron stays dead (see screen.py)."""

from .dense import Dense
from .problem import Problem
from .screen import Screen

__all__ = ["Compact"]


class Compact(Dense):
    """Dense, of the neurons that passed the screen."""

    def __init__(self, problem: Problem, screened: Screen) -> None:
        super().__init__(problem, screened.neurons)
