"""Accuracy of a network along the paths of its tree."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path as FilePath
from typing import TypedDict

import torch
from torch import Tensor

from hbll.data import Samples
from hbll.recipes import Network
from hbll.recurrent import RecurrentNetwork
from hbll.training import checkpoint
from hbll.training.device import device
from hbll.training.run import Run, open_run
from hbll.tree import Path, format_path

BATCH_SIZE = 1000
"""Samples evaluated at once: bounds the memory, changes no result."""


class PathAccuracy(TypedDict):
    """A path by its name, the blocks it uses, and the share of the test samples classified correctly along it."""

    path: str
    blocks: int
    accuracy: float


def load_network(run: Run) -> Network:
    """The network of a run as its checkpoint has it; ValueError when that is missing or damaged."""
    network = run.recipe.network()
    network.load_state_dict(checkpoint.load(run.checkpoint_file)["network"])
    return network


def evaluate_run(folder: FilePath, names: Sequence[str] = (), data_dir: FilePath | None = None) -> list[PathAccuracy]:
    """A run's network measured on the test samples along the paths of those names, or the usual ones.

    `data_dir` None is the run's own. ValueError when `folder` holds no run, a name is no path, or the data are missing.
    """
    run = open_run(folder)
    run = replace(run, data_dir=data_dir or run.data_dir)
    network = load_network(run).to(device())
    paths = [network.tree.parse(name) for name in names] or usual_paths(network)
    shares = accuracies(network, run.recipe.splits(run.data_dir).test.to(device()), paths)
    return path_accuracies({format_path(path): share for path, share in shares.items()})


def path_accuracies(shares: Mapping[str, float]) -> list[PathAccuracy]:
    """Accuracies by the names of paths, as records."""
    return [PathAccuracy(path=path, blocks=path.count("-") + 1, accuracy=share) for path, share in shares.items()]


def usual_paths(network: Network) -> list[Path]:
    """The chain, then the rim cut short at every length; of a recurrent network the chain and the tree's path."""
    if isinstance(network, RecurrentNetwork):
        return network.usual_paths
    return list(dict.fromkeys([network.tree.chain, *network.tree.rim_paths]))


@torch.no_grad()
def accuracies(network: Network, samples: Samples, paths: Iterable[Path]) -> dict[Path, float]:
    """Share of the samples that the network classifies correctly, by path. The network is left in training mode."""
    network.eval()
    result = {path: _accuracy(network, samples, path) for path in paths}
    network.train()
    return result


def _accuracy(network: Network, samples: Samples, path: Path) -> float:
    correct = torch.zeros((), dtype=torch.long, device=samples.labels.device)
    for inputs, labels in zip(samples.inputs.split(BATCH_SIZE), samples.labels.split(BATCH_SIZE), strict=True):
        guesses: Tensor = network(inputs, path=path).argmax(-1)
        correct += (guesses == labels).sum()
    return int(correct) / samples.labels.numel()  # of sequences, every step counts
