"""Tables made again as the terminal shows them: progress on stderr, results on stdout."""

from pathlib import Path

from rich.progress import TaskID

from hbll.reproduce.reproduction import Reproduction, Results, columns, reproduce, texts
from hbll.train.console import progress_bars, show_table
from hbll.train.run import Run


def reproduce_shown(reproduction: Reproduction, workers: int) -> Results:
    """`reproduce`, with a bar for the runs and one for each run under way."""
    with progress_bars() as progress:
        overall = progress.add_task("runs")
        bars: dict[Path, TaskID] = {}

        def on_run(run: Run) -> None:
            bars[run.folder] = progress.add_task(run.folder.name, total=None)

        def on_end(run: Run, diverged: str | None) -> None:
            progress.update(bars[run.folder], visible=False)
            if diverged is not None:
                progress.console.print(diverged, highlight=False)

        try:
            return reproduce(
                reproduction,
                workers=workers,
                on_count=lambda made, needed: progress.update(overall, completed=made, total=needed),
                on_run=on_run,
                on_step=lambda run, done, steps: progress.update(bars[run.folder], completed=done + 1, total=steps),
                on_end=on_end,
            )
        except KeyboardInterrupt:  # between two runs as well as within one
            raise KeyboardInterrupt(f"stopped and saved in {reproduction.folder}; the same command goes on") from None


def show_table_of(reproduction: Reproduction, results: Results) -> None:
    """The table, and where its page lies."""
    show_table(columns(reproduction), texts(reproduction, results))
    print(f"page: {reproduction.folder / 'report.html'}")
