"""A chain cut into stages of consecutive blocks, by size, number, balance or name.

A stage is what one device would hold and what a rule trains as one: inside it blocks are evaluated one after the other with
exact gradients.
"""

import copy
from collections.abc import Sequence
from functools import cache
from itertools import accumulate, pairwise
from typing import Any, Literal

from torch import Tensor, nn

from hbll.calls import call, check_tensor
from hbll.names import check_known
from hbll.network import Chain

__all__ = ["Stage", "at_blocks", "cut", "even", "fresh_copy"]


class Stage(nn.Module):
    """Consecutive blocks of a chain: a view that shares them.

    Args:
        blocks: the blocks.
        first: the number of the first of them in the chain, from 1.
        index: the stage's own number, from 1.
    """

    def __init__(self, blocks: Sequence[nn.Module], first: int, index: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        # Not a plain attribute, in which stages of one architecture would differ.
        self._place = _Place(first, index)

    @property
    def numbers(self) -> range:
        """The numbers of its blocks in the chain."""
        return range(self._place.first, self._place.first + len(self.blocks))

    @property
    def title(self) -> str:
        """What messages and tables call it."""
        first, *_, last = (*self.numbers, self.numbers[-1])
        return f"block {first}" if first == last else f"stage {self._place.index} (blocks {first}-{last})"

    def forward(self, state: Tensor, /, **context: Any) -> Tensor:
        for i, block in enumerate(self.blocks):
            state = call(block, state, context)
            if not isinstance(state, Tensor):  # its name is looked up here alone: a compiled stage would depend on it
                check_tensor(f"block {self.numbers[i]}", state)
        return state


class _Place:
    """Where a stage is; equal to any other, as the place is no part of what a stage computes."""

    def __init__(self, first: int, index: int) -> None:
        self.first, self.index = first, index

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Place)

    def __hash__(self) -> int:
        return 0


def cut(network: Chain, size: int | Sequence[int] | None) -> tuple[Stage, ...]:
    """The stages of a chain.

    Args:
        size: blocks in a stage, the last of which may have fewer; or of every stage, one after the other; None: all.

    Raises:
        ValueError: it is no chain, a size is no whole number from 1 on, or the sizes of all stages do not add up to the
            number of blocks.
    """
    if not isinstance(network, Chain):
        raise ValueError(
            f"a rule trains a hbll.Chain, not a {type(network).__name__}; a wrapper such as DistributedDataParallel goes "
            "around the rule, and what is to be compiled are its stages"
        )
    count = len(network.blocks)
    size = count if size is None else size
    sizes = [size] if isinstance(size, int) else size
    if not isinstance(sizes, Sequence) or not all(isinstance(s, int) and not isinstance(s, bool) for s in sizes):
        raise ValueError(f"stage is a whole number, or one for every stage; got {size!r}")
    if min(sizes, default=0) < 1:
        raise ValueError(f"stage must be at least 1; got {size}")
    borders = [*range(0, count, size), count] if isinstance(size, int) else [0, *accumulate(size)]
    if borders[-1] != count:
        raise ValueError(
            f"stages of {', '.join(map(str, sizes))} add up to {borders[-1]} blocks; the network has {count}"
        )
    blocks = list(network.blocks)
    return tuple(Stage(blocks[a:b], a + 1, i) for i, (a, b) in enumerate(pairwise(borders), 1))


def even(network: Chain, stages: int, balance: Literal["count", "parameters"] = "count") -> tuple[int, ...]:
    """The sizes of so many stages that are as even as can be, for ``stage=`` of a rule.

    A block without parameters stays with the one before it; those at the start with the first that has some.

    Args:
        balance: what is evened out: the blocks with parameters in each stage (they differ by at most one, the first ones
            having more), or the parameters in each (the largest has as few as can be).

    Raises:
        ValueError: there are fewer blocks with parameters than stages, or an unknown balance.
    """
    check_known(balance, ("count", "parameters"), "balance")
    groups: list[list[nn.Module]] = [[]]
    for block in network.blocks:
        if _has_parameters(block) and any(map(_has_parameters, groups[-1])):
            groups.append([])
        groups[-1].append(block)
    if not 1 <= stages <= len(groups):
        raise ValueError(
            f"the network has {len(groups)} blocks with parameters: cut it into 1..{len(groups)} stages, not {stages}"
        )
    if balance == "count":
        each, rest = divmod(len(groups), stages)
        runs: Sequence[int] = [each + (i < rest) for i in range(stages)]
    else:
        runs = _runs([sum(p.numel() for block in group for p in block.parameters()) for group in groups], stages)
    remaining = iter(groups)
    return tuple(sum(len(next(remaining)) for _ in range(run)) for run in runs)


def at_blocks(network: Chain, starts: Sequence[str]) -> tuple[int, ...]:
    """The sizes of the stages that begin with the blocks of these names, for ``stage=`` of a rule.

    Args:
        starts: of the stages after the first, in order; a block is named as in the network (``blocks.3``).

    Raises:
        ValueError: there is no such block, or they are not in order.
    """
    names = [f"blocks.{i}" for i in range(len(network.blocks))]
    places = [0, *(names.index(check_known(start, names, "block")) for start in starts), len(names)]
    if any(a >= b for a, b in pairwise(places)):
        raise ValueError(f"stages begin with blocks in the order of the network, after the first; got {list(starts)}")
    return tuple(b - a for a, b in pairwise(places))


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _runs(weights: Sequence[int], count: int) -> tuple[int, ...]:
    """The lengths of ``count`` runs of weights, none empty, the largest sum of which is as small as can be."""
    sums = (0, *accumulate(weights))

    @cache
    def best(start: int, runs: int) -> tuple[int, tuple[int, ...]]:
        if runs == 1:
            return sums[-1] - sums[start], (len(weights) - start,)
        choices = []
        for end in range(start + 1, len(weights) - runs + 2):
            largest, lengths = best(end, runs - 1)
            choices.append((max(largest, sums[end] - sums[start]), (end - start, *lengths)))
        return min(choices)

    return best(0, count)[1]


def fresh_copy(module: nn.Module) -> nn.Module:
    """A module like the given one, its parameters drawn anew where its parts know how to."""
    fresh = copy.deepcopy(module)
    for piece in fresh.modules():
        reset = getattr(piece, "reset_parameters", None)
        if callable(reset):
            reset()
    return fresh
