"""Runs as the terminal shows them: progress on stderr, results on stdout."""

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from hbll.generate import Generation
from hbll.recipes import Measure
from hbll.train import metrics
from hbll.train.compare import Comparison, MethodResult, compare
from hbll.train.evaluate import ExitResult, OnBatch, PathResult, evaluate_run
from hbll.train.loop import Interrupted, train
from hbll.train.metrics import Metrics
from hbll.train.run import Run
from hbll.train.tables import EXIT_COLUMNS, exit_row, path_columns, path_row, result_columns, result_row

_NAME_WIDTH = 12
"""Characters that the first column of a table has at least."""


def train_shown(run: Run, *, resume: bool, by: Callable[..., None] = train) -> None:
    """`train`, or what trains as it does, with a bar, a line an epoch, and at the end what each path came to."""
    measures = run.recipe.measures
    with progress_bars() as progress:
        bar = progress.add_task(f"{run.recipe.name}, {run.method}, seed {run.seed}", total=None)

        def on_epoch(line: Metrics) -> None:
            chain = f"{measures[0].title} of the chain {measures[0].text(line.chain[measures[0].name])}"
            text = f"epoch {line.epoch}/{run.recipe.epochs}  loss {line.loss:.4g}  {chain}"
            progress.console.print(text, highlight=False)

        try:
            by(
                run,
                resume=resume,
                on_step=lambda done, steps: progress.update(bar, completed=done + 1, total=steps),
                on_batch=measuring(progress),
                on_epoch=on_epoch,
            )
        except Interrupted:
            raise KeyboardInterrupt(_how_to_resume("train", run.recipe.name, run.folder)) from None
    show_paths(metrics.read(run.metrics_file)[-1].paths, measures)
    print(f"run: {run.folder}")


def compare_shown(comparison: Comparison, *, resume: bool) -> list[MethodResult]:
    """`compare`, with a bar for the runs and one for the run under way."""
    runs = len(comparison.methods) * comparison.seeds
    with progress_bars() as progress:
        overall = progress.add_task("runs", total=runs)
        current = progress.add_task("")
        started = -1

        def on_run(run: Run) -> None:
            nonlocal started
            started += 1
            progress.update(overall, completed=started)
            progress.update(current, description=f"{run.method}, seed {run.seed}", completed=0, total=None)

        try:
            return compare(
                comparison,
                resume=resume,
                on_run=on_run,
                on_step=lambda done, steps: progress.update(current, completed=done + 1, total=steps),
                on_batch=measuring(progress),
            )
        except KeyboardInterrupt:  # between two runs as well as within one
            advice = _how_to_resume("compare", comparison.recipe.name, comparison.folder)
            raise KeyboardInterrupt(advice) from None


def evaluate_shown(folder: Path, *arguments: Any, **options: Any) -> list[PathResult]:
    """`evaluate_run`, with a bar."""
    with progress_bars() as progress:
        bar = progress.add_task(folder.name, total=None)

        def on_batch(done: int, batches: int) -> None:
            progress.update(bar, completed=done, total=batches)

        return evaluate_run(folder, *arguments, **options, on_batch=on_batch)


def show_results(results: Iterable[MethodResult], measures: Sequence[Measure], page: Path) -> None:
    """The table of a comparison and where its page lies."""
    show_table(result_columns(measures), (result_row(result, measures) for result in results))
    print(f"page: {page}")


def show_paths(paths: Sequence[PathResult], measures: Sequence[Measure]) -> None:
    """The table of what the paths came to, and of what they cost if that was measured."""
    show_table(path_columns(measures, "parameters" in paths[0]), (path_row(path, measures) for path in paths))


def show_exits(found: Iterable[ExitResult]) -> None:
    """The table of what leaving early came to."""
    show_table(EXIT_COLUMNS, map(exit_row, found))


def show_rates(generation: Generation) -> None:
    """How fast text was generated, on stderr."""
    rate = f"{generation.tokens_per_second:.1f} tokens/s"
    if generation.acceptance_rate is not None:
        rate += f", {100 * generation.acceptance_rate:.1f} % of {generation.drafted} drafted tokens accepted"
    print(f"{rate}, {generation.passes} passes", file=sys.stderr)


def show_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table on stdout: names to the left, figures to the right; where it is no terminal, a line for each row."""
    rows = list(rows)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=number > 0, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False)
    name, *figures = (max(map(len, column)) for column in zip(columns, *rows, strict=True))
    # Names may be folded on a terminal but not cut away: a table that has no room for its figures is wider than it.
    least = _NAME_WIDTH if console.is_terminal else name
    console.width = max(console.width, least + sum(2 + figure for figure in figures))
    console.print(table)


def progress_bars() -> Progress:
    """Bars on stderr while a person is looking; nothing when it goes to a file."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


def measuring(progress: Progress) -> OnBatch:
    """A bar that is there while an epoch's measures are taken."""
    bar = progress.add_task("measuring", total=None, visible=False)

    def on_batch(done: int, batches: int) -> None:
        if done == 1:
            progress.reset(bar)
        progress.update(bar, completed=done, total=batches, visible=done < batches)

    return on_batch


def _how_to_resume(command: str, recipe: str, folder: Path) -> str:
    return f"stopped and saved; `hbll {command} {recipe} --run-dir {folder} --resume` goes on"
