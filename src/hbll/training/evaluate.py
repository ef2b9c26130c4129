"""A network measured along the paths of its tree."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path as FilePath
from typing import Any, TypeAlias

import torch

from hbll.data import Samples
from hbll.layout import Readout
from hbll.protocols import Network
from hbll.recipes import Measure
from hbll.training import checkpoint
from hbll.training.device import device
from hbll.training.run import Run, open_run

BATCH_SIZE = 1000
"""Samples evaluated at once: bounds the memory, changes no result."""

PathResult: TypeAlias = dict[str, Any]
"""What a path came to: its name as `path`, the `blocks` that it evaluates, and every measure of the recipe under the
measure's own name, None where it is not finite."""


def load_network(run: Run) -> Network:
    """The network of a run as its checkpoint has it; ValueError when that is missing or damaged."""
    network = run.recipe.network()
    network.load_state_dict(checkpoint.load(run.checkpoint_file)["network"])
    return network


def evaluate_run(folder: FilePath, names: Sequence[str] = (), data_dir: FilePath | None = None) -> list[PathResult]:
    """A run's network measured on the test samples along the paths of those names, or the usual ones.

    `data_dir` None is the run's own. ValueError when `folder` holds no run, a name is no path, or the data are missing.
    """
    run = open_run(folder)
    recipe = run.recipe
    network = load_network(run).to(device())
    usual = {readout.name: readout for readout in recipe.objective(run.method).readouts(network)}
    readouts = [usual[name] if name in usual else network.readout(name) for name in names] or usual.values()
    test = recipe.splits(data_dir or run.data_dir).test.to(device())
    return measured(network, test, dict.fromkeys(readouts), recipe.measures)


@torch.no_grad()
def measured(
    network: Network, samples: Samples, readouts: Iterable[Readout], measures: Sequence[Measure]
) -> list[PathResult]:
    """The measures on the samples along each of the readouts. The network is left in training mode."""
    network.eval()
    results = [
        {"path": readout.name, "blocks": readout.blocks, **_means(network, samples, readout, measures)}
        for readout in readouts
    ]
    network.train()
    return results


def _means(
    network: Network, samples: Samples, readout: Readout, measures: Sequence[Measure]
) -> dict[str, float | None]:
    sums = torch.zeros(len(measures), dtype=torch.float64, device=samples.labels.device)
    for inputs, labels in zip(samples.inputs.split(BATCH_SIZE), samples.labels.split(BATCH_SIZE), strict=True):
        logits = readout.scores(network, inputs) if readout.scores else network(inputs, path=readout.path)
        sums += torch.stack([measure.values(logits, labels).sum(dtype=torch.float64) for measure in measures])
    means = (sums / samples.labels.numel()).tolist()  # of sequences, every step counts
    return {measure.name: mean if math.isfinite(mean) else None for measure, mean in zip(measures, means, strict=True)}
