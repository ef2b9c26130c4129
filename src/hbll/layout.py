"""How a rule sees a network: its parts in order, the nodes that a step reports on, and the ways of reading it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hbll.tree import Path

__all__ = ["Layout", "Readout"]


@dataclass(frozen=True)
class Readout:
    """A path through a network, or another way of reading it."""

    name: str
    """The network's name for it, or its blocks joined by dashes."""

    path: Path

    blocks: int
    """Blocks that are evaluated along it; of a recurrent network, cells."""

    scores: Callable[[Any, Tensor], Tensor] | None = None
    """(network, x) -> what the measures take for logits, where a rule has a way of its own to get them."""


@dataclass(frozen=True)
class Layout:
    """What the training loop wants to know to say where something went wrong."""

    engine: str
    """How blocks are evaluated: ``loop`` or ``batched``."""

    parts: Mapping[str, nn.Module]
    """The network's parts by what messages call them, in the order of the chain."""

    walk: Sequence[int] | None
    """The nodes in the order in which a step's losses come about; None for a rule that works on the chain's own states,
    along which the first bad part is to be looked for instead."""
