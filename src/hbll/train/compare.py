"""Methods side by side: one run for every method and seed, and what they came to."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any, TypeAlias

from hbll.locality import locality
from hbll.recipes import Recipe
from hbll.train import metrics
from hbll.train.device import device
from hbll.train.divergence import DivergedError
from hbll.train.evaluate import OnBatch, PathResult
from hbll.train.hold import held
from hbll.train.loop import train
from hbll.train.memory import step_memory
from hbll.train.run import (
    COMPARISON,
    Run,
    check_free,
    check_same,
    known_here,
    open_run,
    read_json,
    stored_recipe,
    write_json,
)

MethodResult: TypeAlias = dict[str, Any]
"""What a `method` came to, means over its `seeds`: every measure of the recipe under the measure's own name, of the chain
after the last epoch, and the `spread` of the first one, its standard deviation over the seeds (None for one seed);
`seconds`, the wall-clock time of a run's training steps; `work` and `span` of a step in the last epoch, in block
evaluations; `memory`, the peak bytes of a step beyond the weights, their gradients, the optimizer and the batch; `local`,
what the audit says of a step; and `paths`, the results of all paths. A method that diverged with one of its seeds has None
for what training would have told, no path, and as `diverged` the step in which it did, counted from 1."""


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
            raise ValueError("--rules needs at least one rule, and each only once")
        self.recipe.check(self.methods)

    @property
    def file(self) -> Path:
        return self.folder / COMPARISON

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
    """The comparison that lies in `folder`; ValueError when none does, or one of another version."""
    stored = read_json(folder, COMPARISON, "comparison")
    with known_here(folder):
        return Comparison(
            recipe=stored_recipe(stored),
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
    on_batch: OnBatch = lambda done, batches: None,
) -> list[MethodResult]:
    """Trains every run that the comparison still lacks; the results, in the order of the methods, are kept with it.

    A method that diverges with one seed is not trained with the others.

    Args:
        comparison: what to compare.
        resume: go on with the comparison that lies in the folder; it may have got more methods or seeds.
        on_run: called before each run.
        on_step, on_batch: as for `train`.

    Raises:
        ValueError: the folder holds a comparison or a run and `resume` is off, or none or another one and it is on; another
            process works in it; or what `train` raises it for, but for divergence.
        Interrupted: Ctrl-C was pressed, or SIGTERM sent.
    """
    _check_folder(comparison, resume)
    with held(comparison.folder):
        _check_folder(comparison, resume)  # again: another process may have come first
        return _compare(comparison, on_run, on_step, on_batch)


def _check_folder(comparison: Comparison, resume: bool) -> None:
    """ValueError unless the comparison can be made, or gone on with, in its folder."""
    if resume:
        _check_goes_on(open_comparison(comparison.folder), comparison)
    else:
        check_free(comparison.folder)
    for method in comparison.methods:
        for run in comparison.runs(method):
            if run.configuration_file.exists():
                check_same(open_run(run.folder), run)


def _check_goes_on(stored: Comparison, wanted: Comparison) -> None:
    """ValueError unless `wanted` has all that `stored` has; it may have more methods, seeds and, as a run, epochs."""
    if not set(stored.methods) <= set(wanted.methods) or wanted.seeds < stored.seeds:
        raise ValueError(
            f"{stored.folder} compares {', '.join(stored.methods)} with --seeds {stored.seeds}: "
            "a comparison is resumed with all of them, or with more; start another with another --run-dir"
        )
    before, now = (replace(one.runs(stored.methods[0])[0], folder=stored.folder) for one in (stored, wanted))
    check_same(before, now)


def _compare(
    comparison: Comparison, on_run: Callable[[Run], None], on_step: Callable[[int, int], None], on_batch: OnBatch
) -> list[MethodResult]:
    stored = {
        "recipe": comparison.recipe.name,
        "options": asdict(comparison.recipe),
        "methods": list(comparison.methods),
        "seeds": comparison.seeds,
        "data_dir": str(comparison.data_dir.absolute()) if comparison.data_dir else None,
    }
    write_json(comparison.file, stored)  # from here on it can be resumed
    diverged: dict[str, int] = {}
    for method in comparison.methods:
        for run in comparison.runs(method):
            on_run(run)
            try:
                train(run, resume=run.configuration_file.exists(), on_step=on_step, on_batch=on_batch)
            except DivergedError as error:
                diverged[method] = error.step
                break
    results = [_result(comparison, method, diverged.get(method)) for method in comparison.methods]
    write_json(comparison.file, stored | {"results": results})
    return results


def open_results(folder: Path) -> list[MethodResult]:
    """What `compare` returned; ValueError when the comparison in `folder` was not finished."""
    stored = read_json(folder, COMPARISON, "comparison")
    if "results" not in stored:
        raise ValueError(f"the comparison in {folder} is not finished: go on with it by --resume")
    return stored["results"]


def _result(comparison: Comparison, method: str, diverged: int | None) -> MethodResult:
    trained = _trained(comparison, method) if diverged is None else _untrained(comparison, diverged)
    return {"method": method, "seeds": comparison.seeds, **trained, **_first_step(comparison, method)}


def _trained(comparison: Comparison, method: str) -> dict[str, Any]:
    """What the runs came to."""
    histories = [metrics.read(run.metrics_file) for run in comparison.runs(method)]
    ends = [history[-1] for history in histories]
    names = [measure.name for measure in comparison.recipe.measures]
    paths = [_mean_over_seeds(path, names) for path in zip(*(end.paths for end in ends), strict=True)]
    firsts = [end.chain[names[0]] for end in ends]
    return {
        **{name: paths[0][name] for name in names},
        "spread": stdev(firsts) if len(firsts) > 1 and None not in firsts else None,
        "seconds": mean(sum(line.seconds for line in history) for history in histories),
        "work": mean(end.work for end in ends),
        "span": mean(end.span for end in ends),
        "paths": paths,
    }


def _untrained(comparison: Comparison, diverged: int) -> dict[str, Any]:
    """The same where there is nothing to tell."""
    names = [measure.name for measure in comparison.recipe.measures]
    return {**dict.fromkeys([*names, "spread", "seconds", "work", "span"]), "paths": [], "diverged": diverged}


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
