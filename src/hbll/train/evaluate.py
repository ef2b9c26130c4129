"""A trained network measured along its paths and at the readouts of its stages: how good, and at what cost."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from hbll.calls import Readout
from hbll.data import Samples
from hbll.exits import calibrate, classify, confidence, costs, first_exits, logits_at, outputs_at
from hbll.losses import IGNORED
from hbll.modes import evaluating
from hbll.network import Chain
from hbll.recipes import Measure, Recipe, flag
from hbll.rule import Rule
from hbll.train import checkpoint
from hbll.train.device import device
from hbll.train.run import Run, check_vocabulary, open_run

TIMED_SECONDS = 0.1
"""For which a readout is evaluated again and again to see how long it takes."""

BATCH_SIZE = 1000
"""Labels predicted at once, of one sample at least: bounds the memory, changes no result."""

OnBatch: TypeAlias = Callable[[int, int], None]
"""Is told how many batches are done, and how many there are."""

PathResult: TypeAlias = dict[str, Any]
"""What a path came to: its name as `path`, the `blocks` that it evaluates, and every measure of the recipe under the
measure's own name, None where it is not finite. If asked for, what it costs: the `parameters` of all that it evaluates,
embed and head among it, and the `milliseconds` for a sample, in batches of `BATCH_SIZE` labels."""

ExitResult: TypeAlias = dict[str, Any]
"""What leaving early came to on the samples that were not calibrated on: `exits`, the readouts to leave at (`stages` or
`rim`); `loss`, of accuracy, that was to be borne; the `threshold` of the confidence, None if leaving early would cost as
much as the chain or lose too much, so that all samples go straight to it; `accuracy`, and `full_accuracy` at the last
readout; `blocks` for a sample on average, and `full_blocks` of the chain; by name the `shares` of the samples that left at
each readout."""


def load_rule(run: Run, best: bool = False) -> Rule:
    """The rule of a run, and with it the network, as its checkpoint has them, or those best by the validation samples.

    ValueError when they cannot be read.
    """
    file = run.best_file if best else run.checkpoint_file
    if best and not file.is_file():
        raise ValueError(f"{run.folder} has no {file.name}: no epoch of it was measured on validation samples")
    if run.parallel != "none" and not file.is_file():
        raise ValueError(
            f"{run.folder} has no {file.name}: its stages are put together at the end of the run, to which --resume leads"
        )
    rule = run.recipe.rule(run.method, run.recipe.network(), None)
    state = run.load_checkpoint(file=file)
    with checkpoint.understood(file):
        rule.load_state_dict(state["rule"])
    return rule


def evaluate_run(
    folder: FilePath,
    names: Sequence[str] = (),
    data_dir: FilePath | None = None,
    *,
    every: bool = False,
    best: bool = False,
    corruption: Mapping[str, Any] | None = None,
    on_batch: OnBatch = lambda done, batches: None,
) -> list[PathResult]:
    """A run's network measured on the test samples along the paths of those names, or the usual ones.

    Args:
        folder: of the run.
        names: of paths, and of readouts of stages.
        data_dir: of the data set; None: the run's own.
        every: the readouts of all stages instead, and a path of each number of blocks, with what they cost.
        best: as of `load_rule`.
        corruption: of the test images, in place of the run's own: `test_missing`, `test_label_noise`.
        on_batch: as of `measured`.

    Raises:
        ValueError: `folder` holds no run, a name is no path, or the data are missing or in other tokens than the run's.
    """
    run = open_run(folder)
    recipe = _corrupted(run.recipe, corruption)
    rule = load_rule(run, best).to(device())
    data_dir = data_dir or run.data_dir
    test = recipe.splits(data_dir).test.to(device())
    check_vocabulary(run, recipe.vocabulary(data_dir))
    rule.build(test.inputs[:1])
    usual = {readout.name: readout for readout in recipe.readouts(rule)}
    asked = [usual[name] if name in usual else recipe.other_readout(rule, name) for name in names]
    if not every:
        readouts = {readout.name: readout for readout in asked} or usual
        return measured(rule, test, list(readouts.values()), recipe.measures, on_batch)
    readouts = recipe.all_readouts(rule)
    results = measured(rule, test, readouts, recipe.measures, on_batch)
    with evaluating(rule):
        costs = [_cost(rule.network, test.inputs[: _batch_size(test)], readout) for readout in readouts]
    return [result | cost for result, cost in zip(results, costs, strict=True)]


def _corrupted(recipe: Recipe, corruption: Mapping[str, Any] | None) -> Recipe:
    """The recipe with other test samples; ValueError if it has none to corrupt."""
    options = corruption or {}
    for option in options:
        if not hasattr(recipe, option):
            raise ValueError(f"{flag(option)} is of images, and {recipe.name} has none: leave it out")
    return replace(recipe, **options)


def evaluate_exits(
    folder: FilePath,
    losses: Sequence[float],
    data_dir: FilePath | None = None,
    best: bool = False,
    corruption: Mapping[str, Any] | None = None,
) -> list[ExitResult]:
    """What leaving a run's classifier at the first readout that is sure enough comes to.

    The validation samples calibrate; where there are none every other test sample does, and the rest are measured.

    Args:
        folder: of the run.
        losses: of accuracy, shares of the samples, each of which is to be borne.
        data_dir: of the data set; None: the run's own.
        best: as of `load_rule`.
        corruption: as of `evaluate_run`.

    Raises:
        ValueError: as `evaluate_run`; a loss is negative; or the run has no classes of whole samples, or no readout but the
            chain's.
    """
    run = open_run(folder)
    recipe = _corrupted(run.recipe, corruption)
    rule = load_rule(run, best).to(device())
    splits = recipe.splits(data_dir or run.data_dir)
    test = splits.test.to(device())
    if test.labels.ndim != 1:
        raise ValueError(
            f"{recipe.name} predicts every token of a sequence: confidence exits are for classes of samples"
        )
    rule.build(test.inputs[:1])
    chain, *shorter = (readout for readout in recipe.readouts(rule) if not readout.scores)
    sequences = {"stages": rule.exits, "rim": [*shorter, chain]}
    sequences = {name: readouts for name, readouts in sequences.items() if len(readouts) > 1}
    if not isinstance(rule.network, Chain) or not sequences:
        raise ValueError(f"{run.method} on {recipe.name} has no readout to leave at before the chain's")
    held_out, rest = (splits.valid.to(device()), test) if splits.valid else (test[::2], test[1::2])
    with evaluating(rule):
        return [
            {"exits": name, "loss": loss, **found}
            for name, readouts in sequences.items()
            for loss, found in zip(losses, _leaving(rule.network, readouts, held_out, rest, losses), strict=True)
        ]


def _leaving(
    network: Chain, readouts: Sequence[Readout], held_out: Samples, rest: Samples, losses: Sequence[float]
) -> Iterator[ExitResult]:
    """What leaving early comes to with each of the losses of accuracy."""
    logits = torch.cat([logits_at(network, readouts, inputs) for inputs in held_out.inputs.split(BATCH_SIZE)], 1)
    batches = rest.inputs.split(BATCH_SIZE)
    full = torch.cat([network(inputs, path=readouts[-1]).argmax(-1) for inputs in batches])
    evaluated = torch.tensor(costs(readouts), dtype=torch.float64, device=logits.device)
    for loss in losses:
        threshold = calibrate(confidence(logits), logits.argmax(-1) == held_out.labels, loss)
        if evaluated[first_exits(confidence(logits), threshold)].mean() >= readouts[-1].blocks:  # larger ones cost more
            threshold = math.inf
        exited = [classify(network, readouts, inputs, threshold) for inputs in batches]
        exits = torch.cat([found.exits for found in exited])
        yield {
            "threshold": threshold if math.isfinite(threshold) else None,
            "accuracy": _share(torch.cat([found.logits.argmax(-1) for found in exited]) == rest.labels),
            "full_accuracy": _share(full == rest.labels),
            "blocks": sum(found.blocks * len(found.exits) for found in exited) / len(rest),
            "full_blocks": readouts[-1].blocks,
            "shares": {readout.name: _share(exits == number) for number, readout in enumerate(readouts)},
        }


def _share(which: Tensor) -> float:
    return which.double().mean().item()


@torch.no_grad()
def measured(
    rule: Rule,
    samples: Samples,
    readouts: Sequence[Readout],
    measures: Sequence[Measure],
    on_batch: OnBatch = lambda done, batches: None,
) -> list[PathResult]:
    """The measures of the rule's network on the samples along each of the readouts.

    Args:
        rule: with the network.
        samples: to measure on.
        readouts: of its network.
        measures: of each of them.
        on_batch: called after each batch of samples with the number of batches done and that of all.
    """
    size = _batch_size(samples)
    batches = list(zip(samples.inputs.split(size), samples.labels.split(size), strict=True))

    def values() -> Iterator[Tensor]:
        for done, (inputs, labels) in enumerate(batches, 1):
            yield torch.stack([_sums(logits, labels, measures) for logits in _scores(rule.network, inputs, readouts)])
            on_batch(done, len(batches))

    with evaluating(rule):
        sums = _added(values(), len(readouts), len(measures))
    units = units_of(samples)
    return [
        {"path": readout.name, "blocks": readout.blocks, **means(row, measures, units)}
        for readout, row in zip(readouts, sums, strict=True)
    ]


def summed(predicted: Iterable[tuple[Tensor, Tensor]], measures: Sequence[Measure]) -> Tensor:
    """The sums of the measures' values over batches of logits and labels, (number of measures,) in float64."""
    return _added((_sums(logits, labels, measures) for logits, labels in predicted), len(measures))


def _added(values: Iterable[Tensor], *shape: int) -> Tensor:
    """The sum of some values of a shape in float64, where they lie."""
    sums = torch.zeros(shape, dtype=torch.float64)
    for value in values:
        sums = sums.to(value.device) + value
    return sums


def _sums(logits: Tensor, labels: Tensor, measures: Sequence[Measure]) -> Tensor:
    return torch.stack([measure.values(logits, labels).sum(dtype=torch.float64) for measure in measures])


def units_of(samples: Samples) -> dict[str, int]:
    """What all labels of some samples amount to: by `labels` their number, and others as the samples know them."""
    return {"labels": int((samples.labels != IGNORED).sum()), **samples.units}  # of sequences, every step counts


def means(sums: Tensor, measures: Sequence[Measure], units: Mapping[str, int]) -> dict[str, float | None]:
    """The measures by what was `summed`."""
    return {
        measure.name: _finite(measure.of_mean, total / units[measure.per])
        for measure, total in zip(measures, sums.tolist(), strict=True)
    }


def _batch_size(samples: Samples) -> int:
    """Samples evaluated at once."""
    return max(1, BATCH_SIZE * len(samples) // samples.labels.numel())


def _finite(of_mean: Callable[[float], float], mean: float) -> float | None:
    try:
        value = of_mean(mean)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def _scores(network: nn.Module, inputs: Tensor, readouts: Sequence[Readout]) -> Iterator[Tensor]:
    """What the measures take for the logits of each of the readouts, one after the other."""
    plain = [readout for readout in readouts if not readout.scores]
    outputs = (
        outputs_at(network, plain, inputs)
        if isinstance(network, Chain)
        else (network(inputs, path=readout.path) for readout in plain)
    )
    return (readout.scores(inputs) if readout.scores else next(outputs) for readout in readouts)


@torch.no_grad()
def _cost(network: nn.Module, inputs: Tensor, readout: Readout) -> dict[str, float]:
    """The parameters that a readout evaluates, and the milliseconds that it takes for a sample."""
    if isinstance(network, Chain):
        blocks = [network.blocks[n - 1] for n in readout.path]
        modules = [network.embed, *blocks, network.reader(readout)]
    else:
        modules = [network]
    named = {"scores": lambda: next(_scores(network, inputs, [readout]))}
    timer = Timer("scores()", globals=named, num_threads=torch.get_num_threads())
    seconds = timer.blocked_autorange(min_run_time=TIMED_SECONDS).median
    return {
        "parameters": sum(p.numel() for p in {p for module in modules for p in module.parameters()}),
        "milliseconds": 1000 * seconds / len(inputs),
    }
