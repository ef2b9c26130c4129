"""Tables made again as the terminal shows them: progress on stderr, results on stdout."""

from hbll.reproduce.reproduction import Reproduction, Results, columns, reproduce, texts
from hbll.train.console import progress_bars, show_table
from hbll.train.run import Run


def reproduce_shown(reproduction: Reproduction) -> Results:
    """`reproduce`, with a bar for the runs and one for the run under way."""
    with progress_bars() as progress:
        overall = progress.add_task("runs", total=len(reproduction.runs))
        current = progress.add_task("")
        started = -1

        def on_run(run: Run) -> None:
            nonlocal started
            started += 1
            progress.update(overall, completed=started)
            progress.update(current, description=run.folder.name, completed=0, total=None)

        try:
            return reproduce(
                reproduction,
                on_run=on_run,
                on_step=lambda done, steps: progress.update(current, completed=done + 1, total=steps),
                on_diverged=lambda error: progress.console.print(str(error), highlight=False),
            )
        except KeyboardInterrupt:  # between two runs as well as within one
            raise KeyboardInterrupt(f"stopped and saved in {reproduction.folder}; the same command goes on") from None


def show_table_of(reproduction: Reproduction, results: Results) -> None:
    """The table, and where its page lies."""
    show_table(columns(reproduction.table), texts(reproduction.table, results))
    print(f"page: {reproduction.folder / 'report.html'}")
