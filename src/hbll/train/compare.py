"""Methods side by side: one run for every method and seed, and what they came to."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, TypeAlias

from hbll.locality import locality
from hbll.recipes import Recipe
from hbll.train import metrics
from hbll.train.device import device
from hbll.train.evaluate import PathResult
from hbll.train.files import write_atomically
from hbll.train.loop import train
from hbll.train.memory import step_memory
from hbll.train.run import Run, check_same, open_run, read_json, stored_recipe

FILE = "comparison.json"


MethodResult: TypeAlias = dict[str, Any]
"""What a `method` came to, means over its `seeds`: every measure of the recipe under the measure's own name, of the chain
after the last epoch, and the `spread` of the first one, its standard deviation over the seeds (None for one seed);
`seconds`, the wall-clock time of a run's training steps; `work` and `span` of a step in the last epoch, in block
evaluations; `memory`, the peak bytes of a step beyond the weights, their gradients, the optimizer and the batch; `local`,
what the audit says of a step; and `paths`, the results of all paths."""


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
        self.recipe.check(self.methods)

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
    runs = [run for method in comparison.methods for run in comparison.runs(method)]
    for run in runs:  # before anything of the comparison that lies there is written over
        if run.configuration_file.exists():
            check_same(open_run(run.folder), run)
    comparison.folder.mkdir(parents=True, exist_ok=True)
    stored = {
        "recipe": comparison.recipe.name,
        "options": asdict(comparison.recipe),
        "methods": list(comparison.methods),
        "seeds": comparison.seeds,
        "data_dir": str(comparison.data_dir.absolute()) if comparison.data_dir else None,
    }
    write_atomically(comparison.file, json.dumps(stored, indent=2) + "\n")  # from here on it can be resumed
    for run in runs:
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
    names = [measure.name for measure in comparison.recipe.measures]
    paths = [_mean_over_seeds(path, names) for path in zip(*(end.paths for end in ends), strict=True)]
    firsts = [end.chain[names[0]] for end in ends]
    return {
        "method": method,
        **{name: paths[0][name] for name in names},
        "spread": stdev(firsts) if len(firsts) > 1 and None not in firsts else None,
        "seeds": len(ends),
        "seconds": mean(sum(line.seconds for line in history) for history in histories),
        "work": mean(end.work for end in ends),
        "span": mean(end.span for end in ends),
        **_first_step(comparison, method),
        "paths": paths,
    }


def _mean_over_seeds(results: Sequence[PathResult], names: Iterable[str]) -> PathResult:
    """One path's results, by seed, as one; a measure that is not finite for a seed is not in the mean either."""
    means = {}
    for name in names:
        values = [result[name] for result in results]
        means[name] = None if None in values else mean(values)
    return results[0] | means


def _first_step(comparison: Comparison, method: str) -> dict[str, Any]:
    """What is told by one step of an untrained network."""
    recipe = comparison.recipe
    batch = recipe.splits(comparison.data_dir).train[: recipe.batch_size].to(device())
    x, y = batch.inputs, batch.labels
    rule = recipe.rule(method, recipe.initial_network(0).to(device()), x).to(device())
    return {"local": locality(rule, x, y), "memory": step_memory(rule, x, y)}
