"""States at all times from the tree alone: every node from its left parent, level by level."""

import torch
from torch import Tensor

from hbll.recurrent.arcs import ArcCells
from hbll.recurrent.network import tree_of

__all__ = ["tree_states"]


def tree_states(cells: ArcCells, x: Tensor) -> Tensor:
    """The states at the times 1..N-1, with the graph of each node's own cell; nothing crosses a level.

    Args:
        cells: the cell of every arc.
        x: (N, B, I), chunks of input.

    Returns:
        (N-1, B, S H), after ceil(log2 N) calls, or two a level where its arcs have cells of two depths.
    """
    tree = tree_of(len(x))
    states = {0: cells.chain.initial(x.shape[1])}
    for level in tree.levels:
        left = [tree.left(n) for n in level]
        found = cells(x, list(zip(left, level, strict=True)), torch.stack([states[n].detach() for n in left]))
        states.update(zip(level, found.unbind(0), strict=True))
    return torch.stack([states[n] for n in tree.chain])
