"""Readouts: the short ways by which a stage's output reaches the label, and what of them is the stage's own.

A *spine* passes the last blocks of a few later stages and ends at the head; the *head* alone is the shortest way; SOLO's
(arXiv 2609.35440) passes blocks of the stage's own and ends at the head's last layer as it was some steps before. Blocks and
heads are the network's, which then learn to be called from afar, or copies, which belong to the stage and meet the originals
now and then, or never.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hbll.calls import call, evaluate
from hbll.cut import Stage
from hbll.network import Chain
from hbll.tree import Tree

__all__ = [
    "LateHead",
    "Meet",
    "Meeting",
    "Spine",
    "StageReadout",
    "copied",
    "load_vector",
    "mean",
    "meet",
    "passed",
    "solo",
    "spine",
    "vector",
]

Spine = Literal["doubling", "right", "last"]

Meet = Literal["mean", "original"]


def spine(node: int, tree: Tree, kind: Spine) -> tuple[int, ...]:
    """The stages whose last blocks a stage's output passes on its way to the head.

    Args:
        node: the stage.
        tree: the tree over stages 1..S.
        kind: ``doubling``: node + 1, + 3, + 7, .., S; ``right``: the right parents up to the label; ``last``: S.
    """
    last = tree.nodes - 1
    if node == last:
        return ()
    if kind == "last":
        return (last,)
    if kind == "right":
        after = tree.right(node)
        return () if after > last else (after, *spine(after, tree, kind))
    ahead = [node + 2**k - 1 for k in range(1, (last - node).bit_length() + 1)]
    return (*(n for n in ahead if n < last), last)


def passed(node: int, stages: Sequence[Stage], kind: Spine | None, depth: int) -> tuple[int, ...]:
    """The numbers of the blocks that a stage's output passes: of every stage of its spine the last ``depth``, of a shorter
    stage all; none without a spine."""
    if kind is None:
        return ()
    jumps = spine(node, Tree(len(stages) + 1), kind)
    return tuple(chain.from_iterable(stages[jump - 1].numbers[-depth:] for jump in jumps))


class StageReadout(nn.Module):
    """A stage's own modules from its output (B, ...) to predictions.

    Args:
        blocks: what the output passes, each keeping its shape.
        head: what reads it then.
        numbers: of the network's blocks, which these are copies of; none of blocks that are nobody's copies.
    """

    def __init__(self, blocks: Sequence[nn.Module], head: nn.Module, numbers: Sequence[int] = ()) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.head = head
        self.numbers = tuple(numbers)

    def forward(self, state: Tensor, /, **context: Any) -> Any:
        for block in self.blocks:
            state = call(block, state, context)
        return evaluate(self.head, state, context)


class LateHead(nn.Module):
    """A copy of a head whose last linear layer is read only, as it was some steps before; and a temperature.

    Args:
        head: the network's.

    Raises:
        ValueError: the head has no linear layer, or its last one is lazy or parametrized.
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        if type(last_linear(head).weight) is not nn.Parameter:
            raise ValueError(
                "readout='solo' reads a weight that is there and computed from no other; the head's last linear layer is "
                "lazy or parametrized: take 'spine' or 'head'"
            )
        self.head = copy.deepcopy(head)
        linear = self.linear
        self.temperature = nn.Parameter(torch.ones_like(linear.weight[0, 0]))
        for name, parameter in list(linear.named_parameters(recurse=False)):
            delattr(linear, name)
            linear.register_buffer(name, parameter.detach())

    @property
    def linear(self) -> nn.Linear:
        """The layer that is read only."""
        return last_linear(self.head)

    def forward(self, state: Tensor, /, **context: Any) -> Tensor:
        scores = evaluate(self.head, state, context)
        if not isinstance(scores, Tensor):
            raise ValueError(
                f"readout='solo' scales what the head returns, which is one tensor; got a {type(scores).__name__}: take "
                "'spine' or 'head'"
            )
        return self.temperature * scores


def last_linear(head: nn.Module) -> nn.Linear:
    """The last linear layer of a head.

    Raises:
        ValueError: it has none.
    """
    layers = [module for module in head.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ValueError(
            "readout='solo' reads the last linear layer of the head, which has none: take 'spine' or 'head'"
        )
    return layers[-1]


def copied(network: Chain, stages: Sequence[Stage], kind: Spine | None, depth: int) -> list[StageReadout]:
    """The readouts of all stages but the last as copies of what they pass."""
    ways = [passed(node, stages, kind, depth) for node in range(1, len(stages))]
    return [
        StageReadout([copy.deepcopy(network.blocks[n - 1]) for n in way], copy.deepcopy(network.head), way)
        for way in ways
    ]


def solo(network: Chain, stages: Sequence[Stage], depth: int) -> list[StageReadout]:
    """SOLO's readouts of all stages but the last, whose blocks begin as the network's first ones."""
    return [
        StageReadout([copy.deepcopy(block) for block in network.blocks[:depth]], LateHead(network.head))
        for _ in stages[:-1]
    ]


@dataclass(frozen=True)
class Meeting:
    """A module of the network and its copies in readouts."""

    original: nn.Module
    owner: int
    """The stage that has the original."""
    copies: Mapping[int, nn.Module]
    """By the stage that has it, in order; all of them come before the owner."""

    @classmethod
    def all(cls, network: Chain, stages: Sequence[Stage], readouts: Sequence[StageReadout]) -> Iterator["Meeting"]:
        """Those of all modules that are copied and have numbers to agree on: blocks in order, then the head, or of late
        heads the last layer."""
        for owner, stage in enumerate(stages, 1):
            for number in stage.numbers:
                copies = {
                    s: readout.blocks[readout.numbers.index(number)]
                    for s, readout in enumerate(readouts, 1)
                    if number in readout.numbers
                }
                if copies and _numbers(network.blocks[number - 1]):
                    yield cls(network.blocks[number - 1], owner, copies)
        heads = {s: readout.head for s, readout in enumerate(readouts, 1)}
        late = {s: head.linear for s, head in heads.items() if isinstance(head, LateHead)}
        if _numbers(network.head):
            yield cls(last_linear(network.head) if late else network.head, len(stages), late or heads)


def meet(original: nn.Module, copies: Sequence[nn.Module], how: Meet) -> None:
    """Sets copies and original to the mean of all of them, or the copies to the original.

    Raises:
        ValueError: they have no longer the same parameters.
    """
    agreed = vector(original)
    if any(sum(tensor.numel() for tensor in _numbers(module)) != len(agreed) for module in copies):
        raise ValueError(
            "a module has other parameters than its copies in readouts: it was changed after the rule was made, so make the "
            "rule anew"
        )
    if how == "mean":
        agreed = mean([vector(module) for module in copies], agreed)
        load_vector(original, agreed)
    for module in copies:
        load_vector(module, agreed)


def mean(copies: Sequence[Tensor], original: Tensor) -> Tensor:
    """The mean of copies and original, added up in this order: the same to the last bit wherever it is made."""
    total = copies[0].clone()
    for value in (*copies[1:], original):
        total += value
    return total / (len(copies) + 1)


def vector(module: nn.Module) -> Tensor:
    """The floating point numbers of a module's state as one vector."""
    return torch.cat([tensor.flatten() for tensor in _numbers(module)])


def load_vector(module: nn.Module, values: Tensor) -> None:
    """Puts what ``vector`` gave into a module of the same form."""
    tensors = _numbers(module)
    for tensor, part in zip(tensors, values.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def _numbers(module: nn.Module) -> list[Tensor]:
    return [tensor for tensor in module.state_dict().values() if tensor.is_floating_point()]
