"""The user's network as a tree: embed, same-shaped blocks, head; the chain, and every path."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path as FilePath

import safetensors
import safetensors.torch
from torch import Tensor, nn

from hbll.blocks import check_shape
from hbll.layout import Readout
from hbll.tree import Path, Tree, format_path

__all__ = ["TreeNetwork", "evaluating"]


class TreeNetwork(nn.Module):
    """A network cut into blocks, with the binary tree over them.

    The modules stay the user's: a network trained by backpropagation is cut by handing over its parts, and
    ``sequential`` hands them back.

    Args:
        embed: maps the input to the first state z_0, shape (B, ...).
        blocks: the N - 1 blocks; each maps a state to a state of the same shape. Any number from 1 on.
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
        self.tree = Tree(len(self.blocks) + 1)

    def forward(self, x: Tensor, path: str | int | Sequence[int] | None = None) -> Tensor:
        """The head's output along a path, by default the chain of all blocks.

        Args:
            x: what embed takes.
            path: see ``resolve``.

        Raises:
            ValueError: the path is none, or a block changes the state's shape.
        """
        state = self.embed(x)
        for n in self.resolve(path):
            output = self.blocks[n - 1](state)
            check_shape(f"block {n}", output, state)
            state = output
        return self.head(state)

    def resolve(self, path: str | int | Sequence[int] | None) -> Path:
        """The blocks of a path given by name (``4-6-7``, ``chain``, ``rim``), as a list, or by its number of blocks.

        Raises:
            ValueError: the tree has no such path.
        """
        if path is None:
            return self.tree.chain
        if isinstance(path, str):
            return self.tree.parse(path)
        if isinstance(path, int):
            return self.tree.path(blocks=path)
        return self.tree.check_path(path)

    @property
    def readouts(self) -> list[Readout]:
        """The paths that are usually measured: the chain, then the rim cut short at every length."""
        return [_readout(path) for path in dict.fromkeys([self.tree.chain, *self.tree.rim_paths])]

    def readout(self, name: str) -> Readout:
        """The readout that a user names; ValueError when the tree has no such path."""
        return _readout(self.tree.parse(name))

    def sequential(self, path: str | int | Sequence[int] | None = None) -> nn.Sequential:
        """The network along a path as a plain nn.Sequential that shares the modules."""
        return nn.Sequential(self.embed, *(self.blocks[n - 1] for n in self.resolve(path)), self.head)

    def features(self, state: Tensor) -> int:
        """The dimension, counted from the end, that holds the features of a state."""
        dim = self.feature_dim
        if dim is None:
            dim = 1 if state.ndim >= 4 else -1
        return dim if dim < 0 else dim - state.ndim

    def save(self, folder: str | FilePath) -> None:
        """Writes ``weights.safetensors`` and ``network.json`` into a folder."""
        folder = FilePath(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # Clones, because safetensors refuses tensors that share memory, as those of a block used twice do.
        weights = {name: tensor.detach().clone().contiguous() for name, tensor in self.state_dict().items()}
        safetensors.torch.save_file(weights, folder / "weights.safetensors")
        (folder / "network.json").write_text(json.dumps(self._configuration(), indent=2) + "\n")

    def load(self, folder: str | FilePath) -> None:
        """Reads what ``save`` wrote into this network, whose modules must be like the saved one's.

        Raises:
            ValueError: the folder is missing or damaged, or the saved network has other blocks, modules or shapes.
        """
        folder, own = FilePath(folder), self._configuration()
        try:
            saved = json.loads((folder / "network.json").read_text())
            weights = safetensors.torch.load_file(folder / "weights.safetensors")
        except (OSError, json.JSONDecodeError, safetensors.SafetensorError) as error:
            raise ValueError(f"{folder} holds no saved network, or a damaged one: {error}") from error
        for what in ("format", "blocks", "feature_dim"):
            if saved[what] != own[what]:
                raise ValueError(f"{folder} holds another network: {what} is {saved[what]} there and {own[what]} here")
        for name in {**saved["shapes"], **own["shapes"]}:
            there, here = saved["shapes"].get(name), own["shapes"].get(name)
            if there != here:
                raise ValueError(f"{folder} holds another network: {name} has shape {there} there and {here} here")
        self.load_state_dict(weights)

    def _configuration(self) -> dict:
        shapes = {name: list(tensor.shape) for name, tensor in self.state_dict().items()}
        return {"format": 1, "blocks": len(self.blocks), "feature_dim": self.feature_dim, "shapes": shapes}


def _readout(path: Path) -> Readout:
    return Readout(format_path(path), path, len(path))


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """The module in evaluation mode, in which running statistics stand still; afterwards as it was."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
