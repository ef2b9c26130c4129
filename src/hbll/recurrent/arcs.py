"""Cells of every depth: the function of each arc of the tree over time.

An arc (a, b) takes the state at time a to the state at time b and consumes the chunks x_a .. x_{b-1} at once. The paper
describes two readings: a cell for every depth, its input 2^d chunks wide, or one cell for all arcs, its input the mean of
the chunks (arXiv 2606.21497, section 4.5 and appendix). Either way an arc of one chunk is a step of the deployed chain.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn

from hbll.models.cells import Cell

__all__ = ["Arc", "ArcCells", "DepthCells", "SharedCell", "depth"]

Arc: TypeAlias = tuple[int, int]
"""The times (a, b), a < b, between which it leads."""


def depth(arc: Arc) -> int:
    """The depth of the cell of an arc, ceil(log2 length)."""
    return (arc[1] - arc[0] - 1).bit_length()


class ArcCells(nn.Module):
    """The cells of all arcs; those of arcs that share a cell are evaluated in one call.

    Args:
        kind: makes a cell of so many inputs and so many units: a class, or a functools.partial of one with options. It is
            pickled with the network.
        inputs: of each of the cells.
        width: H, units of the hidden state.
    """

    def __init__(self, kind: Callable[[int, int], Cell], inputs: Iterable[int], width: int) -> None:
        super().__init__()
        self.kind = kind
        self.cells = nn.ModuleList(kind(size, width) for size in inputs)

    @property
    def chain(self) -> Cell:
        """The cell of arcs of one chunk: the deployed network."""
        return cast(Cell, self.cells[0])

    def cell(self, arc: Arc) -> int:
        """Which of the cells an arc has."""
        raise NotImplementedError

    def inputs(self, x: Tensor, arcs: Sequence[Arc]) -> Tensor:
        """What the one cell of these arcs reads of the chunks (N, B, I): (n, B, inputs of the cell)."""
        raise NotImplementedError

    def groups(self, arcs: Sequence[Arc]) -> list[tuple[int, ...]]:
        """The places of arcs that one call evaluates together."""
        kinds: dict[int, list[int]] = {}
        for place, arc in enumerate(arcs):
            kinds.setdefault(self.cell(arc), []).append(place)
        return [tuple(places) for places in kinds.values()]

    def forward(self, x: Tensor, arcs: Sequence[Arc], states: Tensor, first: Tensor | None = None) -> Tensor:
        """The states at the ends of arcs.

        Args:
            x: (N, B, I), the chunks.
            arcs: n of them.
            states: (n, B, S H), at their beginnings.
            first: (B,), the time at which each sequence begins, the chunks before it being zeros; arcs that end by then
                hold the state. None where all begin at 0.
        """
        groups = self.groups(arcs)
        if len(groups) == 1:
            new = self._evaluate(x, arcs, states)
        else:
            ends = [self._evaluate(x, [arcs[place] for place in group], _take(states, group)) for group in groups]
            new = _take(torch.cat(ends), _inverse([place for group in groups for place in group]))
        if first is None:
            return new
        begun = _index(tuple(b for _, b in arcs), x.device)[:, None] > first
        return torch.where(begun[..., None], new, states)

    def _evaluate(self, x: Tensor, arcs: Sequence[Arc], states: Tensor) -> Tensor:
        return self.cells[self.cell(arcs[0])](self.inputs(x, arcs), states)


class DepthCells(ArcCells):
    """A cell for every depth; the cell of depth d reads 2^d chunks side by side.

    Shorter arcs of its depth have zeros for the chunks that they lack, at the start.

    Args:
        kind: makes a cell of so many inputs and so many units: a class, or a functools.partial of one with options.
        inputs: I, width of a chunk.
        width: H, units of the hidden state.
        depths: number of cells; they reach over 2^(depths-1) chunks, and so serve sequences of up to 2^depths.
    """

    def __init__(self, kind: Callable[[int, int], Cell], inputs: int, width: int, depths: int) -> None:
        super().__init__(kind, (2**d * inputs for d in range(depths)), width)

    def cell(self, arc: Arc) -> int:
        if depth(arc) >= len(self.cells):
            raise ValueError(
                f"the arc from {arc[0]} to {arc[1]} needs a cell of depth {depth(arc)}, and the deepest here has depth "
                f"{len(self.cells) - 1}: the sequence is longer than {2 ** len(self.cells)} chunks"
            )
        return depth(arc)

    def inputs(self, x: Tensor, arcs: Sequence[Arc]) -> Tensor:
        span = 2 ** depth(arcs[0])
        if span == 1:
            return _take(x, tuple(a for a, _ in arcs))
        padded = torch.cat([x.new_zeros(1, *x.shape[1:]), x])  # chunk t is at t + 1, nothing at 0
        places = [tuple(t + 1 if t >= a else 0 for t in range(b - span, b)) for a, b in arcs]
        chunks = _take(padded, tuple(place for arc in places for place in arc))
        return chunks.unflatten(0, (len(arcs), span)).transpose(1, 2).flatten(2)


class SharedCell(ArcCells):
    """One cell for all arcs, which reads the mean of the arc's chunks.

    Args:
        kind: as of ``DepthCells``.
        inputs: I, width of a chunk.
        width: H, units of the hidden state.
    """

    def __init__(self, kind: Callable[[int, int], Cell], inputs: int, width: int) -> None:
        super().__init__(kind, [inputs], width)

    def cell(self, arc: Arc) -> int:
        return 0

    def inputs(self, x: Tensor, arcs: Sequence[Arc]) -> Tensor:
        weights = _means(tuple(arcs), len(x), x.device).to(x.dtype)
        return (weights @ x.flatten(1)).view(len(arcs), *x.shape[1:])


def _inverse(order: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def _take(x: Tensor, places: tuple[int, ...]) -> Tensor:
    if places == tuple(range(places[0], places[0] + len(places))):
        return x[places[0] : places[0] + len(places)]  # a view: the commonest case, all of them
    return x.index_select(0, _index(places, x.device))


# Made once per shape, because a transfer to the device at every level of every step would cost more than the level.
@lru_cache(maxsize=1024)
def _index(places: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(places, device=device)


@lru_cache(maxsize=1024)
def _means(arcs: tuple[Arc, ...], length: int, device: torch.device) -> Tensor:
    """(n, N): row k averages the chunks of arc k."""
    rows = torch.zeros(len(arcs), length)
    for row, (a, b) in zip(rows, arcs, strict=True):
        row[a:b] = 1 / (b - a)
    return rows.to(device)
