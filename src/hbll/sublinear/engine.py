"""What an engine is: a search structure that knows which neurons fire now, and that follows a step of the weights."""

from collections import Counter
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from .pairs import Pairs

__all__ = ["ENGINES", "Engine", "EngineName"]

EngineName = Literal["tree", "slack", "compact", "dense"]
ENGINES: tuple[EngineName, ...] = ("tree", "slack", "compact", "dense")


class Engine(Protocol):
    """Rows are neurons, ascending; an engine may leave out those that fire on no training point."""

    neurons: NDArray[np.int64]
    signs: NDArray[np.int8]
    work: Counter[str]  # operations so far, by name

    def fired(self) -> Pairs:
        """Every pair with <w_r, x_i> > b at the present weights, and that value."""
        ...

    def move(self, fired: Pairs, step: NDArray[np.float64]) -> None:
        """w_r -= m^-1/2 a_r sum of step_i x_i over the pairs of r in `fired`."""
        ...

    def coefficients(self) -> Pairs:
        """A with w_r = w_r(0) - m^-1/2 a_r sum_i A_ri x_i."""
        ...
