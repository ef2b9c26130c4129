"""Methods side by side: one run for every method and seed, and what they came to."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, TypedDict

from hbll.recipes import Recipe
from hbll.training import metrics
from hbll.training.device import device
from hbll.training.evaluate import PathAccuracy, path_accuracies
from hbll.training.files import write_atomically
from hbll.training.loop import train
from hbll.training.memory import step_memory
from hbll.training.metrics import Metrics
from hbll.training.run import Run, read_json, stored_recipe

FILE = "comparison.json"


class MethodResult(TypedDict):
    """What a method came to; means over its seeds."""

    method: str
    accuracy: float
    """Of the chain, a share of the test samples, after the last epoch."""
    spread: float | None
    """Standard deviation of the accuracy over the seeds; None for one seed."""
    seeds: int
    seconds: float
    """Wall-clock time of a run's training steps."""
    work: int
    span: int
    """Of a step, in block evaluations."""
    memory: int
    """Peak bytes of a step, beyond the weights, the optimizer and the batch."""
    paths: list[PathAccuracy]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What to compare, and the folder to keep it in; ValueError for a method that there is not, or none at all."""

    recipe: Recipe
    methods: Sequence[str]
    seeds: int
    folder: Path
    data_dir: Path | None = None

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"--seeds must be at least 1, not {self.seeds}")
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise ValueError("--methods needs at least one method, and each only once")
        for method in self.methods:
            self.recipe.objective(method)

    @property
    def file(self) -> Path:
        return self.folder / FILE

    def runs(self, method: str) -> list[Run]:
        """The runs of a method, seed by seed."""
        return [
            Run(
                recipe=self.recipe,
                method=method,
                seed=seed,
                folder=self.folder / f"{method}-s{seed}",
                data_dir=self.data_dir,
            )
            for seed in range(self.seeds)
        ]


def open_comparison(folder: Path) -> Comparison:
    """The comparison that lies in `folder`; ValueError when none does."""
    stored = read_json(folder, FILE, "comparison")
    return Comparison(
        recipe=stored_recipe(stored, folder),
        methods=tuple(stored["methods"]),
        seeds=stored["seeds"],
        folder=folder,
        data_dir=Path(stored["data_dir"]) if stored["data_dir"] else None,
    )


def compare(
    comparison: Comparison,
    *,
    resume: bool = False,
    on_run: Callable[[Run], None] = lambda run: None,
    on_step: Callable[[int, int], None] = lambda done, steps: None,
) -> list[MethodResult]:
    """Trains every run that the comparison still lacks; the results, in the order of the methods, are kept with it.

    Args:
        comparison: what to compare.
        resume: go on with the comparison that lies in the folder; it may have got more methods or seeds.
        on_run: called before each run.
        on_step: as for `train`.

    Raises:
        ValueError: the folder holds a comparison and `resume` is off, or what `train` raises it for.
        Interrupted: Ctrl-C was pressed.
    """
    if comparison.file.exists() and not resume:
        raise ValueError(
            f"{comparison.folder} holds a comparison already: give --resume to go on with it, or another --run-dir"
        )
    comparison.folder.mkdir(parents=True, exist_ok=True)
    stored = {
        "recipe": comparison.recipe.name,
        "options": asdict(comparison.recipe),
        "methods": list(comparison.methods),
        "seeds": comparison.seeds,
        "data_dir": str(comparison.data_dir.absolute()) if comparison.data_dir else None,
    }
    write_atomically(comparison.file, json.dumps(stored, indent=2) + "\n")  # from here on it can be resumed
    for run in (run for method in comparison.methods for run in comparison.runs(method)):
        on_run(run)
        train(run, resume=run.configuration_file.exists(), on_step=on_step)
    results = [_result(comparison, method) for method in comparison.methods]
    write_atomically(comparison.file, json.dumps(stored | {"results": results}, indent=2) + "\n")
    return results


def open_results(folder: Path) -> list[MethodResult]:
    """What `compare` returned; ValueError when the comparison in `folder` was not finished."""
    stored = read_json(folder, FILE, "comparison")
    if "results" not in stored:
        raise ValueError(f"the comparison in {folder} is not finished: go on with it by --resume")
    return stored["results"]


def _result(comparison: Comparison, method: str) -> MethodResult:
    histories = [metrics.read(run.metrics_file) for run in comparison.runs(method)]
    ends = [history[-1] for history in histories]
    shares = {path: mean(end.accuracy[path] for end in ends) for path in ends[0].accuracy}
    chains = [chain_accuracy(end) for end in ends]
    return MethodResult(
        method=method,
        accuracy=mean(chains),
        spread=stdev(chains) if len(chains) > 1 else None,
        seeds=len(ends),
        seconds=mean(sum(line.seconds for line in history) for history in histories),
        work=ends[0].work,
        span=ends[0].span,
        memory=_memory(comparison, method),
        paths=path_accuracies(shares),
    )


def chain_accuracy(line: Metrics) -> float:
    """Along the chain, the longest path."""
    return line.accuracy[max(line.accuracy, key=lambda path: path.count("-"))]


def _memory(comparison: Comparison, method: str) -> int:
    recipe = comparison.recipe
    batch = recipe.splits(comparison.data_dir).train[: recipe.batch_size].to(device())
    network: Any = recipe.initial_network(0).to(device())  # of the kind that the recipe's rules train
    return step_memory(network, recipe.objective(method).prepare(network).to(device()), batch)
