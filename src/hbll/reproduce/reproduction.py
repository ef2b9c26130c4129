"""A table made again: one run folder for every training that its figures need, and what they came to.

FOLDER/cifar10-vit-stream-stage-3-4-s0/   a run for each training and seed
FOLDER/table.json                         the figures so far, beside the paper's
FOLDER/report.html                        the page
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any, TypeAlias

from hbll.files import write_atomically
from hbll.names import check_known
from hbll.recipes import RECIPES, Measure
from hbll.reproduce.tables import Figure, Row, Scale, Table, Training, trainings
from hbll.train import metrics
from hbll.train.divergence import DivergedError
from hbll.train.loop import train
from hbll.train.metrics import Metrics
from hbll.train.report import page, section, table_of
from hbll.train.run import Run, check_same, open_run

Results: TypeAlias = list[dict[str, Any]]
"""Rows: `setting`, `rule`, and `figures`, each with its `column`, what was `measured`, a value for each seed that is there,
and what the `paper` has (None where it has nothing), both as people read them, shares in percent."""


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """What to make, and the folder to keep it in.

    Args:
        table: the table.
        scale: `small`, for minutes a run on two cores; or `paper`, with the paper's hyper-parameters.
        folder: where runs and results lie; what is there already is not made again.
        rules: whose rows are made; all, if none is named.
        seeds: runs of each training, with seeds from 0.
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
    options: Mapping[str, Any] = field(default_factory=dict)
    data_dir: Path | None = None

    def __post_init__(self) -> None:
        for rule in self.rules:
            check_known(rule, self.table.rules, "rule of this table")
        if self.seeds < 1:
            raise ValueError(f"--seeds must be at least 1, not {self.seeds}")
        for training in trainings(self.rows):
            training.at(self.scale, **self.options)

    @property
    def rows(self) -> list[Row]:
        """Those that are made."""
        return [row for row in self.table.rows if not self.rules or row.rule in self.rules]

    @property
    def runs(self) -> list[Run]:
        """All that the rows need: all trainings with the first seed, then with the next."""
        return [self.run(training, seed) for seed in range(self.seeds) for training in trainings(self.rows)]

    def run(self, training: Training, seed: int) -> Run:
        return Run(
            recipe=training.at(self.scale, **self.options),
            method=training.method,
            seed=seed,
            folder=self.folder / f"{training.name}-s{seed}",
            data_dir=self.data_dir,
        )


def reproduce(
    reproduction: Reproduction,
    *,
    on_run: Callable[[Run], None] = lambda run: None,
    on_step: Callable[[int, int], None] = lambda done, steps: None,
    on_diverged: Callable[[DivergedError], None] = lambda error: None,
) -> Results:
    """Makes every run that is not finished, and after each the page anew.

    A run that diverges has no figures, and the page says so; it is tried again when the table is gone on with.

    Args:
        reproduction: what to make.
        on_run: called before each run, whether it is finished already or not.
        on_step: as of `train`, of the run under way.
        on_diverged: called when a run diverges, with what `train` says.

    Raises:
        ValueError: a run in the folder is another than the one of its name; as of `train`.
        KeyboardInterrupt: Ctrl-C was pressed; the run under way was saved, and the same call goes on.
    """
    runs = reproduction.runs
    for run in runs:  # before anything is trained
        if run.configuration_file.exists():
            check_same(open_run(run.folder), run)
    diverged: list[str] = []
    for run in runs:
        on_run(run)
        if len(_history(run)) < run.recipe.epochs:
            try:
                train(run, resume=run.configuration_file.exists(), on_step=on_step)
            except DivergedError as error:
                diverged.append(run.folder.name)
                on_diverged(error)
            write_results(reproduction, diverged)
    return write_results(reproduction, diverged)


def write_results(reproduction: Reproduction, diverged: Sequence[str]) -> Results:
    """Writes the figures of what is finished, and their page, which names the runs that diverged, into the folder."""
    results = [
        {
            "setting": row.setting,
            "rule": row.rule,
            "figures": [
                {"column": column, "measured": _measured(reproduction, figure), "paper": figure.paper}
                for column, figure in zip(reproduction.table.columns, row.figures, strict=True)
            ],
        }
        for row in reproduction.rows
    ]
    content = {"title": reproduction.table.title, "scale": reproduction.scale, "rows": results}
    write_atomically(reproduction.folder / "table.json", json.dumps(content, indent=2) + "\n")
    write_atomically(reproduction.folder / "report.html", _page(reproduction, results, diverged))
    return results


def columns(table: Table) -> list[str]:
    """The columns of a table as people read it: what was measured, and the paper's beside it where it has any."""
    result = ["setting"] if table.rows[0].setting else []
    result.append("rule")
    for number, column in enumerate(table.columns):
        result += [column, "paper"] if _published(table, number) else [column]
    return result


def texts(table: Table, results: Results) -> list[list[str]]:
    """The rows under `columns`."""
    rows = []
    for result in results:
        row = [result["setting"]] if table.rows[0].setting else []
        row.append(result["rule"])
        for number, figure in enumerate(result["figures"]):
            row.append(_text(figure["measured"]))
            if _published(table, number):
                row.append("" if figure["paper"] is None else f"{figure['paper']:.2f}")
        rows.append(row)
    return rows


def _published(table: Table, column: int) -> bool:
    return any(row.figures[column].paper is not None for row in table.rows)


def _text(values: Sequence[float]) -> str:
    """A mean, and the standard deviation over the seeds if there are several."""
    if not values:
        return ""
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def _measured(reproduction: Reproduction, figure: Figure) -> list[float]:
    """A value for every seed for which it is there."""
    found = []
    for seed in range(reproduction.seeds):
        history = _finished(reproduction.run(figure.training, seed))
        if figure.faster_than is not None:
            exact = _finished(reproduction.run(figure.faster_than, seed))
            value = _seconds(exact) / _seconds(history) if history and exact else None
        else:
            value = _value(history[-1], figure.readout, _measure(reproduction.table, figure)) if history else None
        found += [] if value is None else [value]
    return found


def _measure(table: Table, figure: Figure) -> Measure:
    measures = RECIPES[figure.training.recipe].measures
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


def _page(reproduction: Reproduction, results: Results, diverged: Sequence[str]) -> str:
    table = reproduction.table
    made = [run for run in reproduction.runs if _finished(run)]
    missing = [rule for rule in table.rules if rule not in [row.rule for row in reproduction.rows]]
    seeds = "one seed" if reproduction.seeds == 1 else f"mean and standard deviation over {reproduction.seeds} seeds"
    scale = (
        "the paper's hyper-parameters"
        if reproduction.scale == "paper"
        else "a small scale: other networks, shorter runs"
    )
    summary = (
        f"arXiv 2606.21497 made again at {scale}; {seeds}, the test samples after the last epoch, nothing selected by them. "
        f"{len(made)} of {len(reproduction.runs)} runs are finished."
    )
    if diverged:
        summary += f" Diverged: {', '.join(diverged)}."
    if missing:
        summary += f" Rows that were not asked for: {', '.join(missing)}."
    runs = [[run.folder.name, str(run.recipe.epochs), str(run.recipe.width), f"{_total(run):.0f}"] for run in made]
    figures = table_of(columns(table), texts(table, results))
    return page(
        title=table.title,
        summary=summary,
        sections=[
            section("Figures", f"What was measured, and what the paper has. {table.text}", figures),
            section(
                "Runs",
                "Each in a folder of its own, of which `hbll report` writes a page.",
                table_of(["run", "epochs", "width", "seconds"], runs),
            ),
        ],
    )


def _total(run: Run) -> float:
    return sum(line.seconds for line in _history(run))
