"""The chain cut into stages of consecutive blocks: what the nodes of a training rule stand for.

Inside a stage blocks are evaluated one after the other with exact gradients, as one device would do; the rule works
between stages, on the tree over them. Stages of one block are the plain rule.
"""

import copy
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise

from torch import nn

from hbll.blocks import make_engine
from hbll.tree import Tree

__all__ = ["Stages", "fresh_copy"]


class Stages:
    """The stages of a network, numbered like nodes from 1 on.

    Args:
        blocks: the network's blocks.
        size: blocks in a stage, the last of which may have fewer; or of every stage, one after the other.
        engine: ``auto``, ``loop`` or ``batched``, see ``make_engine``.

    Attributes:
        blocks: the blocks that were cut; a network whose blocks are replaced needs new stages.
        numbers: the blocks of every stage by their numbers in the network.
        tree: the binary tree over the stages.
        engine: evaluates stages.
        last_blocks: evaluates the last block of stages; the engine itself if stages are single blocks.

    Raises:
        ValueError: the sizes of all stages do not add up to the number of blocks.
    """

    def __init__(self, blocks: nn.ModuleList, size: int | Sequence[int], engine: str) -> None:
        self.blocks = list(blocks)
        if isinstance(size, int):
            borders = [*range(0, len(blocks), size), len(blocks)]
        else:
            borders = [0, *accumulate(size)]
            if borders[-1] != len(blocks):
                raise ValueError(
                    f"stages of {', '.join(map(str, size))} add up to {borders[-1]} blocks; the network has {len(blocks)}"
                )
        self.numbers = [tuple(range(before + 1, after + 1)) for before, after in pairwise(borders)]
        self.tree = Tree(len(self.numbers) + 1)
        if len(self.numbers) == len(blocks):
            self.engine = self.last_blocks = make_engine(list(blocks), self.names, engine)
        else:
            cut = [nn.Sequential(*(blocks[n - 1] for n in stage)) for stage in self.numbers]
            self.engine = make_engine(cut, self.names, engine)
            last = [blocks[stage[-1] - 1] for stage in self.numbers]
            self.last_blocks = make_engine(last, [f"block {stage[-1]}" for stage in self.numbers], engine)

    @property
    def nodes(self) -> tuple[int, ...]:
        """All stages."""
        return self.tree.chain

    @property
    def names(self) -> list[str]:
        """What messages and tables call the stages."""
        return [
            f"block {s[0]}" if len(s) == 1 else f"stage {i} (blocks {s[0]}-{s[-1]})"
            for i, s in enumerate(self.numbers, 1)
        ]

    def of(self, block: int) -> int:
        """The stage that holds a block."""
        return next(i for i, numbers in enumerate(self.numbers, 1) if block in numbers)

    def depth(self, nodes: Iterable[int]) -> int:
        """The blocks of the longest of these stages: what evaluating them at once adds to the span."""
        return max(len(self.numbers[n - 1]) for n in nodes)

    def size(self, nodes: Iterable[int]) -> int:
        """The blocks of all of these stages together."""
        return sum(len(self.numbers[n - 1]) for n in nodes)


def fresh_copy(module: nn.Module) -> nn.Module:
    """A module like the given one, its parameters drawn anew where its parts know how to."""
    fresh = copy.deepcopy(module)
    for part in fresh.modules():
        reset = getattr(part, "reset_parameters", None)
        if callable(reset):
            reset()
    return fresh
