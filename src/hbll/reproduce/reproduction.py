"""A table made again: one run folder for every training that its figures need, and what they came to.

FOLDER/cifar10-vit-stream-stage-3-4-s0/                       a run for each training and seed
FOLDER/cifar10-vit-stream-stage-3-4-learning-rate-0.004-s0/   and learning rate, where several are compared
FOLDER/table.json                                             the figures so far, beside the paper's
FOLDER/report.html                                            the page
"""

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any, TypeAlias

from hbll.files import write_atomically
from hbll.names import check_known
from hbll.recipes import RECIPES, Measure, Recipe
from hbll.recipes.images import ImageRecipe
from hbll.reproduce.tables import Figure, Row, Scale, Table, Training, trainings
from hbll.train import metrics
from hbll.train.metrics import Metrics
from hbll.train.page import page, section, table_of
from hbll.train.rates import best_rate, next_rate
from hbll.train.run import TABLE, Run, check_same, open_run
from hbll.train.several import OnStep, train_several

Results: TypeAlias = list[dict[str, Any]]
"""Rows: `setting`, `rule`, its `options` that are not its own defaults, and `figures`, each with its `column`, what was
`measured`, a value for each seed that is there, and what the `paper` has (None where it has nothing), both as people read
them, shares in percent. Where learning rates are compared also the `rate`, the best so far (None before there is one), and
whether it is at the `edge`: the highest or lowest one tried."""

HELD_OUT = 5000
"""Training images that are held out where learning rates are compared; texts have a part for it."""


@dataclass(frozen=True)
class Search:
    """At which learning rate a training is made, as far as its runs have told."""

    tried: Sequence[float | None]
    """With the first seed, in this order; None is the recipe's own."""

    best: float | None
    """By the held-out samples; None if it is the recipe's own, or not known yet."""

    edge: bool
    """Whether it is the highest or lowest one tried."""

    settled: bool
    """Whether no other will be."""


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """What to make, and the folder to keep it in.

    Args:
        table: the table.
        scale: `small`, for minutes a run on two cores; or `paper`, with the paper's hyper-parameters.
        folder: where runs and results lie; what is there already is not made again.
        rules: whose rows are made, first come, first made; all, if none is named.
        seeds: runs of each training, with seeds from 0.
        rates: learning rates, at each of which a training is made with the first seed; while the best is the highest or
            lowest, the next one, twice or half of it, is tried too. What counts is the chain on held-out samples, after the
            last epoch. The best has the figures and the other seeds. None: the recipes' own.
        options: of all recipes, in place of what the scale says.
        data_dir: folder that holds the data sets.

    Raises:
        ValueError: the table has no row of a rule, or an option cannot be.
    """

    table: Table
    folder: Path
    scale: Scale = "small"
    rules: Sequence[str] = ()
    seeds: int = 1
    rates: Sequence[float] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    data_dir: Path | None = None

    def __post_init__(self) -> None:
        for rule in self.rules:
            check_known(rule, self.table.rules, "rule of this table")
        if self.seeds < 1:
            raise ValueError(f"--seeds must be at least 1, not {self.seeds}")
        for rate in self.rates:
            if not 0 < rate < math.inf:
                raise ValueError(f"--rates must be above 0 and finite, not {rate}")
        if self.rates and self.table.measure == "speed":
            raise ValueError("--rates are for how good networks get, and this table is of speed: leave them out")
        for training in self.trainings:
            self.recipe(training, None)

    @property
    def rows(self) -> list[Row]:
        """Those that are made."""
        return [row for row in self.table.rows if not self.rules or row.rule in self.rules]

    @property
    def trainings(self) -> list[Training]:
        """All that they need, by the order of the rules."""
        return trainings(sorted(self.rows, key=lambda row: self.rules.index(row.rule) if self.rules else 0))

    def recipe(self, training: Training, rate: float | None) -> Recipe:
        """At a learning rate of its own, or among those compared at this one."""
        if rate is None:
            return training.at(self.scale, **self.options)
        held_out = {"validation_samples": HELD_OUT} if issubclass(RECIPES[training.recipe], ImageRecipe) else {}
        return training.at(self.scale, **{**held_out, **self.options, "learning_rate": rate})

    def run(self, training: Training, seed: int, rate: float | None) -> Run:
        name = training.name if rate is None else f"{training.name}-learning-rate-{rate}"
        return Run(
            recipe=self.recipe(training, rate),
            method=training.method,
            seed=seed,
            folder=self.folder / f"{name}-s{seed}",
            data_dir=self.data_dir,
        )

    def search(self, training: Training, diverged: Collection[str] = ()) -> Search:
        """Where its search for a learning rate stands.

        Args:
            training: one of this table's.
            diverged: the names of the runs that did.
        """
        if len(self.rates) < 2:  # nothing to compare
            rate = self.rates[0] if self.rates else None
            return Search([rate], rate, edge=rate is not None, settled=True)
        tried = list(dict.fromkeys(self.rates))
        while True:
            known = {rate: self._score(training, rate, diverged) for rate in tried}
            scores = {rate: score for rate, score in known.items() if score is not None}
            settled = len(scores) == len(tried)
            beyond = next_rate(scores) if settled else None
            if beyond is None:
                best, edge = best_rate(scores) if scores else (None, False)
                return Search(tried, best, edge, settled)
            tried.append(beyond)

    def _score(self, training: Training, rate: float, diverged: Collection[str]) -> float | None:
        """What the first seed came to on held-out samples, more if better; NaN if it diverged, None if it has not ended."""
        run = self.run(training, 0, rate)
        if run.folder.name in diverged:
            return math.nan
        history = _finished(run)
        if not history:
            return None
        measure = _measure(self.table, training)
        assert history[-1].validation is not None
        value = history[-1].validation[measure.name]
        return math.nan if value is None else value if measure.percent else -value

    def runs(self, diverged: Collection[str] = ()) -> list[Run]:
        """All that the rows need, as far as is known: all trainings with the first seed, at their first rates, then at the
        next; then with the other seeds."""
        searches = {training: self.search(training, diverged) for training in self.trainings}
        first = [
            (place, self.run(training, 0, rate))
            for training, search in searches.items()
            for place, rate in enumerate(search.tried)
        ]
        others = [
            self.run(training, seed, search.best)
            for seed in range(1, self.seeds)
            for training, search in searches.items()
            if search.settled
        ]
        return [*(run for _, run in sorted(first, key=lambda placed: placed[0])), *others]


def reproduce(
    reproduction: Reproduction,
    *,
    workers: int = 1,
    on_count: Callable[[int, int], None] = lambda made, needed: None,
    on_run: Callable[[Run], None] = lambda run: None,
    on_step: OnStep = lambda run, done, steps: None,
    on_end: Callable[[Run, str | None], None] = lambda run, diverged: None,
) -> Results:
    """Makes every run that is not finished, and after each the page anew.

    A run that diverges has no figures, and the page says so; it is tried again when the table is gone on with.

    Args:
        reproduction: what to make.
        workers: runs that are made at once; if several, each in a process, on a CPU with one thread.
        on_count: called with the number of runs that have ended and of all that are needed, whenever one may have changed.
        on_run, on_step, on_end: as of `train_several`.

    Raises:
        ValueError: a run in the folder is another than the one of its name; as of `train_several`; there is no such number
            of workers, or of several the times would be compared.
        KeyboardInterrupt: Ctrl-C was pressed; the runs under way were saved, and the same call goes on.
    """
    if workers < 1:
        raise ValueError(f"--workers must be at least 1, not {workers}")
    if workers > 1 and reproduction.table.measure == "speed":
        raise ValueError(
            "runs that share a machine tell nothing of their speed, which this table is of: leave out --workers"
        )
    for run in reproduction.runs():  # before anything is trained
        if run.configuration_file.exists():
            check_same(open_run(run.folder), run)
    diverged: dict[str, str] = {}

    def due() -> list[Run]:
        runs = reproduction.runs(diverged)
        left = [run for run in runs if run.folder.name not in diverged and not _finished(run)]
        on_count(len(runs) - len(left), len(runs))
        return left

    def ended(run: Run, divergence: str | None) -> None:
        if divergence is not None:
            diverged[run.folder.name] = divergence
        on_end(run, divergence)
        write_results(reproduction, diverged)

    if workers > 1 and (left := due()):
        left[0].recipe.splits(reproduction.data_dir)  # what is wrong with the data is told, and tokens are made, once
    train_several(due, workers, on_run=on_run, on_step=on_step, on_end=ended)
    return write_results(reproduction, diverged)


def write_results(reproduction: Reproduction, diverged: Collection[str] = ()) -> Results:
    """Writes the figures of what is finished, and their page, which names the runs that diverged, into the folder."""
    results = [
        {
            "setting": row.setting,
            "rule": row.rule,
            "options": _options(reproduction, row),
            "figures": [
                {"column": column, **_made(reproduction, figure, diverged), "paper": figure.paper}
                for column, figure in zip(reproduction.table.columns, row.figures, strict=True)
            ],
        }
        for row in reproduction.rows
    ]
    content = {"title": reproduction.table.title, "scale": reproduction.scale, "rows": results}
    reproduction.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(reproduction.folder / TABLE, json.dumps(content, indent=2) + "\n")
    write_atomically(reproduction.folder / "report.html", _page(reproduction, results, diverged))
    return results


def columns(reproduction: Reproduction) -> list[str]:
    """The columns of a table as people read it: what was measured, and the paper's beside it where it has any."""
    table = reproduction.table
    result = ["setting"] if table.rows[0].setting else []
    result += ["rule", "rate"] if reproduction.rates else ["rule"]
    for number, column in enumerate(table.columns):
        result += [column, "paper"] if _published(table, number) else [column]
    return result


def texts(reproduction: Reproduction, results: Results) -> list[list[str]]:
    """The rows under `columns`: a rule with its options, and a learning rate with * if it is the highest or lowest tried."""
    table = reproduction.table
    rows = []
    for result in results:
        row = [result["setting"]] if table.rows[0].setting else []
        row.append(_with_options(result["rule"], result["options"]))
        if reproduction.rates:
            row.append(_rates(result["figures"]))
        for number, figure in enumerate(result["figures"]):
            row.append(_text(figure["measured"]))
            if _published(table, number):
                row.append("" if figure["paper"] is None else f"{figure['paper']:.2f}")
        rows.append(row)
    return rows


def _options(reproduction: Reproduction, row: Row) -> dict[str, Any]:
    options = reproduction.recipe(row.figures[0].training, None).rule_options(row.rule)
    return {option: list(value) if isinstance(value, tuple) else value for option, value in options.items()}


def _with_options(rule: str, options: Mapping[str, Any]) -> str:
    words = [
        " ".join([option.replace("_", " "), *map(str, value if isinstance(value, list) else [value])])
        for option, value in options.items()
    ]
    return f"{rule} ({', '.join(words)})" if words else rule


def _rates(figures: Sequence[Mapping[str, Any]]) -> str:
    """Of a row whose figures are of one training its rate, else one for each."""
    found = ["" if one["rate"] is None else f"{one['rate']:g}{'*' if one['edge'] else ''}" for one in figures]
    return found[0] if len(set(found)) == 1 else ", ".join(rate or "-" for rate in found)


def _published(table: Table, column: int) -> bool:
    return any(row.figures[column].paper is not None for row in table.rows)


def _text(values: Sequence[float]) -> str:
    """A mean, and the standard deviation over the seeds if there are several."""
    if not values:
        return ""
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def _made(reproduction: Reproduction, figure: Figure, diverged: Collection[str]) -> dict[str, Any]:
    """A value for every seed for which it is there, and the learning rate where several are compared."""
    search = reproduction.search(figure.training, diverged)
    found = []
    for seed in range(reproduction.seeds):
        history = _finished(reproduction.run(figure.training, seed, search.best))
        if figure.faster_than is not None:
            exact = _finished(reproduction.run(figure.faster_than, seed, None))
            value = _seconds(exact) / _seconds(history) if history and exact else None
        else:
            measure = _measure(reproduction.table, figure.training)
            value = _value(history[-1], figure.readout, measure) if history else None
        found += [] if value is None else [value]
    return {"measured": found} | ({"rate": search.best, "edge": search.edge} if reproduction.rates else {})


def _measure(table: Table, training: Training) -> Measure:
    measures = RECIPES[training.recipe].measures
    return next(measure for measure in measures if measure.name == table.measure)


def _value(line: Metrics, readout: str | int, measure: Measure) -> float | None:
    """What a readout came to, as people read it; None if there is none like it, or it is not finite."""
    chain, *others = line.paths
    found = [chain] if readout == "chain" else [path for path in others if readout in (path["path"], path["blocks"])]
    value = found[0][measure.name] if found else None
    return None if value is None else measure.scale * value


def _seconds(history: Sequence[Metrics]) -> float:
    return mean(line.seconds for line in history)


def _finished(run: Run) -> list[Metrics]:
    history = _history(run)
    return history if len(history) == run.recipe.epochs else []


def _history(run: Run) -> list[Metrics]:
    return metrics.read(run.metrics_file)


def _page(reproduction: Reproduction, results: Results, diverged: Collection[str]) -> str:
    table, runs = reproduction.table, reproduction.runs(diverged)
    made = [run for run in runs if _finished(run)]
    missing = [rule for rule in table.rules if rule not in [row.rule for row in reproduction.rows]]
    seeds = "one seed" if reproduction.seeds == 1 else f"mean and standard deviation over {reproduction.seeds} seeds"
    scale = (
        "the paper's hyper-parameters"
        if reproduction.scale == "paper"
        else "a small scale: other networks, shorter runs"
    )
    summary = (
        f"arXiv 2606.21497 made again at {scale}; {seeds}, the test samples after the last epoch, nothing selected by them. "
        f"{len(made)} of {len(runs)} runs are finished."
    )
    if diverged:
        summary += f" Diverged: {', '.join(diverged)}."
    if missing:
        summary += f" Rows that were not asked for: {', '.join(missing)}."
    figures = table_of(columns(reproduction), texts(reproduction, results))
    rows = [
        [
            run.folder.name,
            one.optimizer,
            f"{one.learning_rate:g}",
            str(one.epochs),
            str(one.width),
            f"{_total(run):.0f}",
        ]
        for run in made
        for one in [run.recipe]
    ]
    return page(
        title=table.title,
        summary=summary,
        sections=[
            section(
                "Figures", f"What was measured, and what the paper has. {table.text} {_searched(reproduction)}", figures
            ),
            section(
                "Runs",
                "Each in a folder of its own, of which `hbll report` writes a page.",
                table_of(["run", "optimizer", "rate", "epochs", "width", "seconds"], rows),
            ),
        ],
    )


def _searched(reproduction: Reproduction) -> str:
    """How learning rates were chosen."""
    if len(reproduction.rates) < 2:
        return "Learning rates were not searched, whether they suit a rule or not; the runs are below with theirs."
    rates = ", ".join(f"{rate:g}" for rate in reproduction.rates)
    recipe = reproduction.recipe(reproduction.trainings[0], reproduction.rates[0])
    images = recipe.validation_samples if isinstance(recipe, ImageRecipe) else None
    held_out = "the text's validation part" if images is None else f"{images} training images that are held out"
    return (
        f"Every training has the learning rate, of {rates}, at which the chain of the first seed was best on {held_out}, "
        "after the last epoch; while that was the highest or lowest, the next, twice or half of it, was tried too (*: it "
        "still is)."
    )


def _total(run: Run) -> float:
    return sum(line.seconds for line in _history(run))
