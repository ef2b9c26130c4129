"""The user's network as a chain: embed, blocks, head; the binary tree over the blocks, and every path through it."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any, Self

from torch import Tensor, nn

from hbll.adapt import split
from hbll.calls import (
    Context,
    PathLike,
    Readout,
    apply,
    check_shape,
    check_tensor,
    evaluate,
    out_of_order,
    takes,
)
from hbll.files import read_tensors, write_atomically, write_tensors
from hbll.generate import Generation, generate
from hbll.tree import Path, Tree, format_path

__all__ = ["Chain", "resolve"]


class Chain(nn.Module):
    """A network cut into blocks, with the binary tree over them.

    The modules stay the user's: a network trained by backpropagation is cut by handing over its parts, or by ``cut``, and
    ``sequential`` hands them back. Blocks may change the shape of the state as long as the rule, or the path, evaluates
    them in order; whoever calls a block out of order checks that it keeps the shape.

    Args:
        embed: maps the input to the first state z_0, shape (B, ...), or to a pair of it and a *context*, a dict that
            travels with the batch: every block, and the head, is given those of its entries, as keywords, that its
            ``forward`` names, or all if it takes ``**kwargs``.
        blocks: the N - 1 blocks, each from a state to a state; of a tuple that a block returns the first item is the state.
        head: maps a state to whatever the loss takes (logits, predictions).
        feature_dim: the dimension of a state that holds features; the dimensions between it and the batch are tokens or
            pixels. By default the last one for states (B, F) and (B, T, F), dimension 1 for images (B, C, H, W).

    Raises:
        ValueError: there is no block.
    """

    def __init__(
        self, embed: nn.Module, blocks: Iterable[nn.Module], head: nn.Module, feature_dim: int | None = None
    ) -> None:
        super().__init__()
        self.embed = embed
        self.blocks = nn.ModuleList(blocks)
        self.head = head
        self.feature_dim = feature_dim
        if not self.blocks:
            raise ValueError("a network needs at least one block between embed and head")
        self._tree = Tree(len(self.blocks) + 1)
        self._known: set[str] = set()

    @property
    def tree(self) -> Tree:
        """The binary tree over the blocks."""
        if self._tree.nodes != len(self.blocks) + 1:  # blocks were added
            self._tree = Tree(len(self.blocks) + 1)
        return self._tree

    @classmethod
    def cut(cls, model: nn.Module, at: Sequence[str], feature_dim: int | None = None) -> Self:
        """A model of others, cut at some of its modules; it shares the model's modules.

        Args:
            model: a model through which one tensor runs: an ``nn.Sequential``, nested ones, or any module that
                ``torch.fx`` can trace. What is more than that is cut by hand, with ``part`` and a context.
            at: the paths of the modules that start each block (``"layers.0"``), then of the one that starts the head;
                what lies before the first is the embed.
            feature_dim: as of the class.

        Raises:
            ValueError: the model has no such module, they do not come in this order, embed or head would be empty,
                something else than one state crosses a cut, or the forward draws random numbers itself (of a generator of
                its own that is not seen).
        """
        embed, *blocks, head = split(model, at)
        return cls(embed, blocks, head, feature_dim)

    def forward(self, x: Any, path: PathLike = None) -> Any:
        """The head's output along a path, by default the chain of all blocks.

        Args:
            x: what embed takes.
            path: see ``resolve``; or a stage's readout, such as ``rule.exits`` has them.

        Raises:
            ValueError: the path is none, or leaves out blocks although one of it changes the state's shape.
        """
        readout = self.way(path)
        state, context = self.embedded(x)
        state = self.along(readout.path, state, context, of_stage=readout.head is not None)
        return evaluate(self.reader(readout), state, context)

    def reader(self, readout: Readout) -> nn.Module:
        """What reads the state at the end of a readout's path."""
        return self.head if readout.head is None else readout.head

    def along(self, path: Path, state: Tensor, context: Context, of_stage: bool = False) -> Tensor:
        """The state that the blocks of a path make of the embedded input.

        Args:
            of_stage: whether it is read by what is made for it: the first blocks of the chain may then change its shape.

        Raises:
            ValueError: as ``forward``.
        """
        for place in range(len(path)):
            state = self.passed(path, place, state, context, of_stage)
        return state

    def passed(self, path: Path, place: int, state: Tensor, context: Context, of_stage: bool = False) -> Tensor:
        """What the block at a place of a path, from 0, makes of the state that those before it have made; as ``along``."""
        n = path[place]
        name, block = f"block {n}", self.blocks[n - 1]
        if n == place + 1 and (of_stage or path == self.tree.chain):  # after all blocks before it
            return apply(name, block, state, context)
        with out_of_order(name, state):
            output = apply(name, block, state, context)
        check_shape(name, output, state)
        return output

    def embedded(self, x: Any, **options: Any) -> tuple[Tensor, Context]:
        """The first state and the context of a batch.

        Args:
            options: what embed takes beside the batch, such as where in a sequence tokens start.

        Raises:
            ValueError: embed returns neither a tensor nor one with a dict, or the context has an entry that nothing takes.
        """
        output = self.embed(x, **options)
        if isinstance(output, Tensor):
            return output, {}
        if not (isinstance(output, tuple) and len(output) == 2 and isinstance(output[1], Mapping)):
            check_tensor("embed", output[0] if isinstance(output, tuple) and output else output)
            raise ValueError("embed returns a state, or a pair of a state and a context, which is a dict")
        state, context = output
        check_tensor("embed", state)
        for key in context:
            if key not in self._known:
                if all(taken is not None and key not in taken for taken in map(takes, [*self.blocks, self.head])):
                    raise ValueError(
                        f"the context that embed returns has an entry {key!r}, which neither a block nor the head takes: "
                        "name it among the arguments of their forward"
                    )
                self._known.add(key)
        return state, context

    def read(self, state: Tensor, context: Context) -> Any:
        """The head's output of a state."""
        return evaluate(self.head, state, context)

    def resolve(self, path: str | int | Sequence[int] | None) -> Path:
        """The blocks of a path given by name (``4-6-7``, ``block-4``, ``chain``, ``rim``), as a list, or by their number.

        Raises:
            ValueError: the tree has no such path.
        """
        return resolve(self.tree, path)

    def way(self, path: PathLike) -> Readout:
        """What ``resolve`` takes, or a readout, as a readout."""
        return path if isinstance(path, Readout) else _readout(self.resolve(path))

    def generate(self, tokens: Tensor, max_new_tokens: int, **options: Any) -> Generation:
        """Tokens that go on from those given: see ``hbll.generate.generate``."""
        return generate(self, tokens, max_new_tokens, **options)

    @property
    def readouts(self) -> list[Readout]:
        """The paths that are usually measured: the chain, then the rim cut short at every length."""
        return [_readout(path) for path in dict.fromkeys([self.tree.chain, *self.tree.rim_paths])]

    def readout(self, name: str) -> Readout:
        """The readout that a user names; ValueError when the tree has no such path."""
        return _readout(self.tree.parse(name))

    def sequential(self, path: str | int | Sequence[int] | None = None) -> nn.Sequential:
        """The network along a path as a plain nn.Sequential that shares the modules; for networks without a context, whose
        blocks return the state alone."""
        return nn.Sequential(self.embed, *(self.blocks[n - 1] for n in self.resolve(path)), self.head)

    def features(self, state: Tensor) -> int:
        """The dimension, counted from the end, that holds the features of a state.

        Raises:
            ValueError: the state has no such dimension, or it is the batch's.
        """
        dim = self.feature_dim
        if dim is None:
            dim = 1 if state.ndim >= 4 else -1
        from_end = dim if dim < 0 else dim - state.ndim
        if not -state.ndim < from_end < 0:
            raise ValueError(
                f"feature_dim={dim} is no dimension of features of a state {tuple(state.shape)}: they are numbered 1 to "
                f"{state.ndim - 1}, after the batch"
            )
        return from_end

    def save(self, folder: str | FilePath) -> None:
        """Writes ``weights.safetensors``, which carries a checksum, and ``network.json`` into a folder."""
        folder = FilePath(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / "weights.safetensors", self.state_dict(), {})
        write_atomically(folder / "network.json", json.dumps(self._configuration(), indent=2) + "\n")

    def load(self, folder: str | FilePath) -> None:
        """Reads what ``save`` wrote into this network, whose modules must be like the saved one's.

        Raises:
            ValueError: the folder is missing or damaged, or the saved network has other blocks, modules or shapes, or other
                weights where this one has one.
        """
        folder, own = FilePath(folder), self._configuration()
        try:
            saved = json.loads((folder / "network.json").read_text(encoding="utf-8"))
            weights, _ = read_tensors(folder / "weights.safetensors")
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} holds no saved network, or a damaged one: {error}") from error
        if not isinstance(saved, dict):
            raise ValueError(
                f"{folder} holds no saved network, or a damaged one: network.json is not a description of one"
            )
        for what in ("format", "blocks", "feature_dim"):
            if saved.get(what) != own[what]:
                raise ValueError(
                    f"{folder} holds another network: {what} is {saved.get(what)} there and {own[what]} here"
                )
        shapes = _shapes(weights)
        for name in {**shapes, **own["shapes"]}:
            there, here = shapes.get(name), own["shapes"].get(name)
            if there != here:
                raise ValueError(f"{folder} holds another network: {name} has shape {there} there and {here} here")
        first_names: dict[Tensor, str] = {}
        for name, tensor in self.state_dict(keep_vars=True).items():
            first = first_names.setdefault(tensor, name)
            if not weights[first].equal(weights[name]):
                raise ValueError(f"{folder} holds another network: {first} and {name} differ there and are one here")
        self.load_state_dict(weights)

    def _configuration(self) -> dict:
        shapes = _shapes(self.state_dict())
        return {"format": 2, "blocks": len(self.blocks), "feature_dim": self.feature_dim, "shapes": shapes}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def resolve(tree: Tree, path: object) -> Path:
    """The nodes of a path through a tree; see ``Chain.resolve``."""
    if path is None:
        return tree.chain
    if isinstance(path, str):
        return tree.parse(path)
    if isinstance(path, int) and not isinstance(path, bool):
        return tree.path(path)
    if isinstance(path, Sequence) and all(isinstance(n, int) and not isinstance(n, bool) for n in path):
        return tree.check_path(path)
    raise ValueError(f"a path is a name such as 4-6-7, a list of blocks, or their number; got {path!r}")


def _readout(path: Path) -> Readout:
    return Readout(format_path(path), path, len(path))
