"""A trained network measured along its paths."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path as FilePath
from typing import Any, TypeAlias

import torch
from torch import nn

from hbll.data import Samples
from hbll.modes import evaluating
from hbll.network import Readout
from hbll.recipes import Measure
from hbll.rule import Rule
from hbll.train import checkpoint
from hbll.train.device import device
from hbll.train.run import Run, open_run

BATCH_SIZE = 1000
"""Samples evaluated at once: bounds the memory, changes no result."""

PathResult: TypeAlias = dict[str, Any]
"""What a path came to: its name as `path`, the `blocks` that it evaluates, and every measure of the recipe under the
measure's own name, None where it is not finite."""


def load_rule(run: Run) -> Rule:
    """The rule of a run, and with it the network, as its checkpoint has them; ValueError when that cannot be read."""
    rule = run.recipe.rule(run.method, run.recipe.network(), None)
    state = checkpoint.load(run.checkpoint_file)
    with checkpoint.understood(run.checkpoint_file):
        rule.load_state_dict(state["rule"])
    return rule


def evaluate_run(folder: FilePath, names: Sequence[str] = (), data_dir: FilePath | None = None) -> list[PathResult]:
    """A run's network measured on the test samples along the paths of those names, or the usual ones.

    `data_dir` None is the run's own. ValueError when `folder` holds no run, a name is no path, or the data are missing.
    """
    run = open_run(folder)
    recipe = run.recipe
    rule = load_rule(run).to(device())
    usual = {readout.name: readout for readout in recipe.readouts(rule)}
    asked = [usual[name] if name in usual else recipe.other_readout(rule, name) for name in names]
    readouts = {readout.name: readout for readout in asked} or usual
    test = recipe.splits(data_dir or run.data_dir).test.to(device())
    return measured(rule, test, readouts.values(), recipe.measures)


@torch.no_grad()
def measured(
    rule: Rule, samples: Samples, readouts: Iterable[Readout], measures: Sequence[Measure]
) -> list[PathResult]:
    """The measures of the rule's network on the samples along each of the readouts."""
    with evaluating(rule):
        return [
            {"path": readout.name, "blocks": readout.blocks, **_means(rule.network, samples, readout, measures)}
            for readout in readouts
        ]


def _means(
    network: nn.Module, samples: Samples, readout: Readout, measures: Sequence[Measure]
) -> dict[str, float | None]:
    sums = torch.zeros(len(measures), dtype=torch.float64, device=samples.labels.device)
    for inputs, labels in zip(samples.inputs.split(BATCH_SIZE), samples.labels.split(BATCH_SIZE), strict=True):
        logits = readout.scores(inputs) if readout.scores else network(inputs, path=readout.path)
        sums += torch.stack([measure.values(logits, labels).sum(dtype=torch.float64) for measure in measures])
    means = (sums / samples.labels.numel()).tolist()  # of sequences, every step counts
    return {measure.name: mean if math.isfinite(mean) else None for measure, mean in zip(measures, means, strict=True)}
