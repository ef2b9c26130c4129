"""A recurrent network over a tree of time steps: the deployed chain, the tree path, any path between, and streaming."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from hbll.calls import Readout
from hbll.models.cells import GRU, LSTM, Cell
from hbll.modes import is_trained
from hbll.network import resolve as resolve_in_tree
from hbll.recurrent.arcs import ArcCells
from hbll.tree import Path, Tree, format_path

__all__ = ["RecurrentNetwork", "Sequences", "beginnings", "check_network", "tree_of", "walk"]

Sequences: TypeAlias = Tensor | tuple[Tensor, Tensor]
"""A batch of sequences, as a network's embed takes them; or, of unequal length, a pair (a list of two, as a DataLoader makes
it, will do) of sequences that are padded at the start and of their lengths (B,), a tensor or a list of whole numbers, the
chunks that are no padding. What the padding holds does not matter."""

ExportedT = TypeVar("ExportedT", bound=nn.Module)

tree_of = lru_cache(maxsize=64)(Tree)
"""The tree over times 0..N; made once for every length."""


class RecurrentNetwork(nn.Module):
    """A recurrent cell with a head, and cells for the longer arcs of the tree over its time steps.

    The deployed network is the *chain*: the cell of one-chunk arcs, step after step. The other cells train it, and give
    shorter paths through the same sequence.

    What is called with a batch, here and of rules, takes ``Sequences``: a tensor, or a pair of it and the lengths.

    Args:
        cells: the cell of every arc; ``cells.chain`` is the deployed one.
        head: maps a hidden state (..., H) to whatever the loss takes.
        every_step: the head reads every state (language) and not only the last one (classification).
        embed: maps the input to chunks (B, N, I); by default the input is that already.
        length: N of the sequences that the network is trained on; the network takes any, but has a ``tree`` then.
    """

    def __init__(
        self,
        cells: ArcCells,
        head: nn.Module,
        every_step: bool = False,
        embed: nn.Module | None = None,
        length: int | None = None,
    ) -> None:
        super().__init__()
        self.length = length
        self.embed = nn.Identity() if embed is None else embed
        self.cells = cells
        self.head = head
        self.every_step = every_step

    @property
    def cell(self) -> Cell:
        """The deployed cell."""
        return self.cells.chain

    @property
    def tree(self) -> Tree:
        """The tree over the time steps of the sequences that the network is trained on."""
        if self.length is None:
            raise ValueError("a recurrent network has a tree once it knows the length of its sequences: give length=")
        return tree_of(self.length)

    @property
    def blocks(self) -> nn.ModuleList:
        """The cells, by depth."""
        return self.cells.cells

    @property
    def readouts(self) -> list[Readout]:
        """The paths that have names: the ``chain`` and, where the head reads the last state alone, another, the ``tree``."""
        if self.length == 1:  # which has no tree
            return [_readout("chain", ())]
        tree, chain = self.tree.rim, self.tree.chain
        named = {"chain": chain} if self.every_step or tree == chain else {"chain": chain, "tree": tree}
        return [_readout(name, path) for name, path in named.items()]

    def readout(self, name: str) -> Readout:
        """The readout that a user names; ValueError when there is none like it."""
        known = {readout.name: readout for readout in self.readouts}
        if name in known:
            return known[name]
        path = self.tree.parse(name)
        own = next((readout for readout in self.readouts if readout.path == path), None)
        return own or _readout(format_path(path), path)

    def embedded(self, x: Sequences) -> tuple[Tensor, Tensor | None]:
        """The chunks (N, B, I), time first, those of the padding 0; and (B, N), false for the padding, or None if there is
        none.

        Raises:
            ValueError: sequences or lengths of a wrong shape.
        """
        lengths = None
        if not isinstance(x, Tensor):
            if not (isinstance(x, tuple | list) and len(x) == 2 and isinstance(x[0], Tensor)):
                raise ValueError(f"a batch is sequences, or a pair of them and their lengths; got a {type(x).__name__}")
            x, lengths = x
        if is_trained(self.embed):  # by what it is given, in the padding too
            check_numbers(x)
        chunks = self.embed(x)
        check_sequences(chunks, self.cell.inputs)
        present = presence(lengths, chunks)
        if present is not None:
            chunks = torch.where(present.unsqueeze(-1), chunks, 0)
        check_numbers(chunks)
        return chunks.transpose(0, 1), present

    def forward(self, x: Sequences, path: str | int | Sequence[int] | None = None) -> Tensor:
        """The head's output along a path.

        Args:
            x: a batch of sequences of N chunks.
            path: times at which the sequence is cut, as in ``hbll.tree`` over N nodes: ``chain`` (or None), ``rim``, its
                other name ``tree``, ``4-6-7``, a list, or a number of times.

        Returns:
            (B, ...) from the last state, or (B, N, ...) if the head reads every step.

        Raises:
            ValueError: no such path, a path other than the chain for outputs of every step, or sequences of a wrong shape.
        """
        chunks, present = self.embedded(x)
        times = resolve(path, len(chunks))
        chain = len(times) == len(chunks) - 1
        if self.every_step and not chain:
            raise ValueError("only the chain has outputs of every step")
        state = self.cell.initial(chunks.shape[1])
        if chain:
            hidden, _ = walk(self.cell, chunks, state, present)
            return self.head(torch.stack(hidden, 1) if self.every_step else hidden[-1])
        first = beginnings(present)
        for arc in zip((0, *times), (*times, len(chunks)), strict=True):
            state = self.cells(chunks, [arc], state.unsqueeze(0), first)[0]
        return self.head(self.cell.hidden(state))

    def unroll(self, x: Sequences, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The chain from a state on: streaming, state in and state out.

        Args:
            x: a batch of the next N chunks; a sequence keeps its state over its padding.
            state: (B, S H), what the last call returned; zeros at first.

        Returns:
            The hidden states after every step (B, N, H), and the state after the last one (B, S H).

        Raises:
            ValueError: sequences, lengths or a state of a wrong shape.
        """
        chunks, present = self.embedded(x)
        batch = chunks.shape[1]
        initial = self.cell.initial(batch)
        if state is not None and state.shape != initial.shape:
            raise ValueError(f"{batch} sequences go on from states {tuple(initial.shape)}; got {tuple(state.shape)}")
        hidden, last = walk(self.cell, chunks, initial if state is None else state, present)
        return torch.stack(hidden, 1), last

    def export_cell(self) -> nn.GRUCell | nn.LSTMCell:
        """The deployed cell as torch's own, with a copy of the weights; the same numbers, and no need of hbll.

        Raises:
            ValueError: torch has no such cell.
        """
        cell = self.cell
        return _load(_kind(cell, GRU=nn.GRUCell, LSTM=nn.LSTMCell)(cell.inputs, cell.width), cell, "")

    def export_sequence(self) -> nn.GRU | nn.LSTM:
        """The deployed chain as nn.GRU or nn.LSTM with batch_first, which cuDNN runs fused; else as ``export_cell``."""
        cell = self.cell
        return _load(_kind(cell, GRU=nn.GRU, LSTM=nn.LSTM)(cell.inputs, cell.width, batch_first=True), cell, "_l0")


def walk(cell: Cell, x: Tensor, state: Tensor, present: Tensor | None) -> tuple[list[Tensor], Tensor]:
    """The chain, step after step: the hidden states after every step, N of (B, H), and the state after the last one.

    Args:
        x: (N, B, I), the chunks.
        state: (B, S H), to begin with.
        present: (B, N), false where the state is held; None if it never is.
    """
    hidden = []
    for t, driven in enumerate(cell.project(x)):
        new = cell.advance(driven, state)
        state = new if present is None else torch.where(present[:, t, None], new, state)
        hidden.append(cell.hidden(state))
    return hidden, state


def _readout(name: str, path: Path) -> Readout:
    # Times are the ends of arcs, each with a cell; the end of the last arc, N, is no part of a path.
    return Readout(name, path, len(path) + 1)


def _kind(cell: Cell, **kinds: Any) -> Any:
    name = type(cell).__name__
    if type(cell) not in (GRU, LSTM):
        raise ValueError(f"torch has no recurrent network like {name}: only a GRU or an LSTM can be exported")
    return kinds[name]


def _load(exported: ExportedT, cell: Cell, suffix: str) -> ExportedT:
    exported.to(cell.weight_hh).load_state_dict({name + suffix: value for name, value in cell.state_dict().items()})
    return exported


def resolve(path: str | int | Sequence[int] | None, length: int) -> Path:
    """The times strictly between 0 and N that a path visits; see ``RecurrentNetwork.forward``."""
    if path is None or path == "chain":
        return tuple(range(1, length))
    if length == 1:
        raise ValueError("a sequence of one chunk has one path, the chain")
    tree = tree_of(length)
    return tree.rim if path == "tree" else resolve_in_tree(tree, path)


def check_network(network: nn.Module) -> None:
    """Raises ValueError unless it is a recurrent network."""
    if not isinstance(network, RecurrentNetwork):
        raise ValueError(
            f"a rule for recurrent networks trains a hbll.recurrent.RecurrentNetwork, not a {type(network).__name__}; a "
            "wrapper such as DistributedDataParallel goes around the rule"
        )


def check_sequences(x: Tensor, inputs: int) -> None:
    """Raises ValueError unless x is (B, N, I) with at least one sequence of at least one chunk of the cell's width."""
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"sequences are (batch, chunks, inputs), none of them 0; got {tuple(x.shape)}")
    if x.shape[2] != inputs:
        raise ValueError(f"the cell reads chunks of width {inputs}; got {x.shape[2]}")


def check_numbers(x: Tensor) -> None:
    """On a CPU raises ValueError if x holds NaN or an infinity; on a GPU looking would stall it, and the training loop finds
    the NaN of the loss."""
    if x.device.type == "cpu" and not bool(x.isfinite().all()):
        raise ValueError("a sequence holds NaN or an infinity, which is not a number to learn from")


def presence(lengths: Any, x: Tensor) -> Tensor | None:
    """(B, N), false for the padding at the start of sequences (B, N, ...); None if there is none.

    Raises:
        ValueError: the lengths are no whole numbers within 1..N, one for each sequence.
    """
    if lengths is None:
        return None
    count = x.shape[1]
    try:
        lengths = torch.as_tensor(lengths)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"lengths are whole numbers, one for each sequence; got {lengths!r}") from error
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise ValueError(f"lengths are whole numbers, one for each sequence; got {lengths.dtype}")
    lengths = lengths.long()  # a byte cannot hold the number of steps
    if lengths.shape != x.shape[:1] or not bool(((lengths >= 1) & (lengths <= count)).all()):
        raise ValueError(f"lengths are (batch,), each from 1 to {count}; got {lengths.tolist()}")
    return torch.arange(count, device=x.device) >= count - lengths[:, None].to(x.device)


def beginnings(present: Tensor | None) -> Tensor | None:
    """The time (B,) at which each sequence begins, as arcs take it; ``present`` (B, N) is None if there is no padding."""
    return None if present is None else (~present).sum(1)
