"""Any sequence of modules cut into blocks: what a network's parts are, and the segments that local rules train.

A segment shares the network's modules and registers nothing: parameters keep the names that they have in the network.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from typing import Any, Literal

from torch import Tensor, nn

from hbll.layout import Readout
from hbll.names import check_known
from hbll.network import TreeNetwork

__all__ = ["Part", "Segment", "SequentialNetwork", "cut", "parts"]


class SequentialNetwork(nn.Sequential):
    """A plain network, the last module of which is the head that gives logits; states may change shape on the way.

    Args:
        modules: at least one and the head.

    Raises:
        ValueError: there is no module before the head.
    """

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__(*modules)
        if len(modules) < 2:
            raise ValueError("a network needs at least one module before its head")

    def forward(self, input: Tensor, path: object = None) -> Tensor:
        """The logits. ``path`` is for symmetry with trees: there is one way through, the chain.

        Raises:
            ValueError: another path is asked for.
        """
        if path not in (None, self._chain.path):
            raise ValueError(f"a plain network has one path, the chain; got {path!r}")
        return super().forward(input)

    def __getitem__(self, idx: Any) -> Any:
        # A slice would be of this class, and the last of its modules taken for a head.
        return nn.Sequential(*self.children())[idx]

    @property
    def _chain(self) -> Readout:
        return Readout("chain", tuple(range(1, len(self))), len(self) - 1)

    @property
    def readouts(self) -> list[Readout]:
        """The ways of reading the network: one."""
        return [self._chain]

    def readout(self, name: str) -> Readout:
        """The readout of that name; ValueError unless it is ``chain``."""
        if name != "chain":
            raise ValueError(f"{name!r} is not a path: a plain network has one, the chain")
        return self._chain


@dataclass(frozen=True)
class Part:
    """A module of a network, by the name that messages and tables use."""

    name: str
    module: nn.Module
    cost: int
    """Evaluations that it counts as: 1 for a block, 0 for embed, head and modules without parameters."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.module.parameters())

    @property
    def trained(self) -> bool:
        return any(p.requires_grad for p in self.parameters)


@dataclass(frozen=True)
class Segment:
    """Consecutive parts of a network that are trained as one block."""

    parts: tuple[Part, ...]

    def __call__(self, state: Tensor) -> Tensor:
        for part in self.parts:
            state = part.module(state)
        return state

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those of all parts."""
        return [p for part in self.parts for p in part.parameters]

    @property
    def cost(self) -> int:
        """The evaluations of a forward pass."""
        return sum(part.cost for part in self.parts)

    @property
    def backward_work(self) -> int:
        """The vector-Jacobian products of a walk back that ends at the segment's own input."""
        work, below = 0, False
        for part in self.parts:
            work += part.cost * (part.trained + below)
            below = below or part.trained
        return work

    @property
    def backward_span(self) -> int:
        """Those of them in which each needs the one before; a part's two products need not wait for each other."""
        first = next((i for i, part in enumerate(self.parts) if part.trained), len(self.parts))
        return sum(part.cost for part in self.parts[first:])


def parts(network: nn.Module) -> list[Part]:
    """The parts of a network in order, the head last.

    Args:
        network: a ``TreeNetwork`` (embed, blocks, head), a ``SequentialNetwork`` or a plain ``nn.Sequential``.

    Raises:
        ValueError: another kind of module, whose parts cannot be told.
    """
    if isinstance(network, TreeNetwork):
        blocks = [Part(f"block {n}", block, 1) for n, block in enumerate(network.blocks, 1)]
        return [Part("embed", network.embed, 0), *blocks, Part("head", network.head, 0)]
    if not isinstance(network, nn.Sequential):
        raise ValueError(f"a {type(network).__name__} has no parts to cut: hand it over as hbll.cuts.SequentialNetwork")
    *body, head = network
    layers = [Part(f"layer {n}", module, int(_has_parameters(module))) for n, module in enumerate(body, 1)]
    return [*layers, Part("head", head, 0)]


def cut(
    body: Sequence[Part],
    blocks: int | Sequence[int] | None = None,
    balance: Literal["count", "parameters"] = "count",
) -> list[Segment]:
    """Cuts parts (the head not among them) into consecutive segments.

    A part without parameters stays with the one before it; those at the start with the first that has some.

    Args:
        blocks: the number of segments, or the parts, counted from 1, after which to cut; by default every part with
            parameters is a segment.
        balance: what a number of segments evens out: the parts in each (they differ by at most one, the first ones having
            more), or the parameters in each (the largest has as few as can be).

    Raises:
        ValueError: there are fewer parts than segments, a place to cut is none, or an unknown balance.
    """
    check_known(balance, ("count", "parameters"), "balance")
    if isinstance(blocks, Sequence):
        if any(a >= b for a, b in pairwise((0, *blocks, len(body)))):
            raise ValueError(
                f"the {len(body)} parts before the head can be cut after parts 1..{len(body) - 1}, in rising order; "
                f"got {list(blocks)}"
            )
        return [Segment(tuple(body[a:b])) for a, b in pairwise((0, *blocks, len(body)))]
    groups = _groups(body)
    count = len(groups) if blocks is None else blocks
    if not 1 <= count <= len(groups):
        raise ValueError(
            f"the network has {len(groups)} parts with parameters before its head: cut it into 1..{len(groups)} "
            f"blocks, not {count}"
        )
    if balance == "count":
        size, rest = divmod(len(groups), count)
        sizes = [size + (i < rest) for i in range(count)]
    else:
        sizes = _even([sum(p.numel() for part in group for p in part.parameters) for group in groups], count)
    remaining = iter(groups)
    return [Segment(tuple(part for _ in range(size) for part in next(remaining))) for size in sizes]


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _groups(body: Sequence[Part]) -> list[list[Part]]:
    """Runs of parts that no number of segments separates."""
    groups: list[list[Part]] = [[]]
    for part in body:
        if _has_parameters(part.module) and any(_has_parameters(earlier.module) for earlier in groups[-1]):
            groups.append([])
        groups[-1].append(part)
    return groups


def _even(weights: Sequence[int], count: int) -> tuple[int, ...]:
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
