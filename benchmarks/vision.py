"""Recipes and the paper's tables where there is no command line (torch, numpy and safetensors alone).

    python benchmarks/vision.py train cifar10-vit stream --preset paper --minutes 5 --folder runs/stream
    python benchmarks/vision.py table runs/bp runs/stream
    python benchmarks/vision.py reproduce table2 --rates 0.004 0.002 0.008 --workers 12 --minutes 8 --folder runs/table2

`--options '{"epochs": 40}'` goes before the options of a preset or a scale. Folders are those that `hbll evaluate`, `hbll
report` and `hbll reproduce` know. After so many minutes everything is saved where it stands; the same call goes on. Tables
are printed as Markdown, of what is finished. Byte pairs need the library tokenizers.
"""

import argparse
import json
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gate import gate

from hbll.recipes import RECIPES
from hbll.reproduce import TABLES, Reproduction, reproduce
from hbll.reproduce.reproduction import columns, texts, write_results
from hbll.reproduce.tables import CORPORA, language
from hbll.rules import RULES
from hbll.train import metrics
from hbll.train.interrupt import SIGNALS
from hbll.train.loop import train
from hbll.train.metrics import Metrics
from hbll.train.run import Run, open_run


@contextmanager
def limited(minutes: float) -> Iterator[None]:
    """After so many minutes inside it is as if Ctrl-C were pressed, which saves what is under way; then a line says so."""
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler)  # which a shell takes from its jobs in the background
    timer = threading.Timer(min(60 * minutes, threading.TIMEOUT_MAX), os.kill, [os.getpid(), signal.SIGINT])
    timer.daemon = True
    try:
        timer.start()
        yield
        timer.cancel()
    except KeyboardInterrupt:
        print(f"stopped and saved, after {minutes} minutes at the latest", flush=True)
    finally:
        timer.cancel()


def train_for(run: Run, minutes: float) -> None:
    """Trains until the last epoch, or saves where the run stands after so many minutes."""

    def on_epoch(line: Metrics) -> None:
        name = run.recipe.measures[0].name
        print(f"{run.method} epoch {line.epoch}: {name} {line.chain[name]}, {line.seconds:.1f} s", flush=True)

    with limited(minutes):
        train(run, resume=run.configuration_file.exists(), on_epoch=on_epoch)


def reproduce_for(reproduction: Reproduction, workers: int, minutes: float) -> str:
    """Makes what so many minutes allow of a table of the paper; the table."""

    def on_end(run: Run, diverged: str | None) -> None:
        seconds = sum(line.seconds for line in metrics.read(run.metrics_file))
        print(f"{run.folder.name}: {diverged or f'{seconds:.0f} s'}", flush=True)

    counts = (0, 0)

    def on_count(*count: int) -> None:
        nonlocal counts
        counts = count

    write_results(reproduction)
    with limited(minutes):
        reproduce(reproduction, workers=workers, on_count=on_count, on_end=on_end)
    results = json.loads((reproduction.folder / "table.json").read_text())["rows"]
    made, needed = counts
    title = f"{reproduction.table.title}, scale {reproduction.scale}: {made} of {needed} runs"
    return f"## {title}\n\n{markdown(columns(reproduction), texts(reproduction, results))}"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table(folders: Iterable[Path]) -> str:
    """What every run came to after its last finished epoch, path by path; seconds are of an epoch's training steps."""
    rows = []
    for folder in folders:
        run, history = open_run(folder), metrics.read(folder / "metrics.jsonl")
        for path in history[-1].paths if history else []:
            seconds = sum(line.seconds for line in history) / len(history)
            values = ", ".join(f"{one.title} {one.text(path[one.name])}" for one in run.recipe.measures)
            epochs, last = f"{len(history)} of {run.recipe.epochs}", history[-1]
            costs = [f"{seconds:.2f}", f"{last.work:.1f}", f"{last.span:.1f}"]
            rows.append([run.recipe.name, run.method, epochs, *costs, path["path"], values])
    return markdown(["recipe", "rule", "epochs", "seconds an epoch", "work", "span", "path", "measures"], rows)


def json_options(text: str) -> dict[str, Any]:
    """Options of a recipe, in which JSON has lists for tuples."""
    return {option: tuple(value) if isinstance(value, list) else value for option, value in json.loads(text).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    one, whole = actions.add_parser("train"), actions.add_parser("reproduce")
    one.add_argument("recipe", choices=RECIPES)
    one.add_argument("rule")
    one.add_argument("--preset", default="small")
    whole.add_argument("table", choices=TABLES)
    whole.add_argument("--corpus", choices=CORPORA, default="wikitext-103", help="of table5")
    whole.add_argument("--scale", default="small")
    whole.add_argument("--rules", nargs="+", default=[], help="whose rows are made, the first first")
    whole.add_argument("--rates", type=float, nargs="+", default=[], help="to compare; the first is made first")
    whole.add_argument("--seeds", type=int, default=1)
    whole.add_argument("--workers", type=int, default=1)
    for action in (one, whole):
        action.add_argument("--options", type=json_options, default={}, help="of the recipe, as JSON")
        action.add_argument("--minutes", type=float, default=float("inf"))
        action.add_argument("--folder", type=Path, required=True)
    actions.add_parser("table").add_argument("folders", type=Path, nargs="+")
    chosen = parser.parse_args()
    if chosen.action == "table":
        print(table(chosen.folders))
    elif chosen.action == "train":
        recipe = RECIPES[chosen.recipe].of_preset(chosen.preset, **chosen.options)
        recipe.check([chosen.rule])
        gate([chosen.rule] if chosen.rule in RULES else ["recurrent"])
        train_for(Run(recipe=recipe, method=chosen.rule, seed=0, folder=chosen.folder), chosen.minutes)
    else:
        reproduction = Reproduction(
            table=language(chosen.corpus) if chosen.table == "table5" else TABLES[chosen.table],
            scale=chosen.scale,
            folder=chosen.folder,
            rules=chosen.rules,
            seeds=chosen.seeds,
            rates=chosen.rates,
            options=chosen.options,
        )
        asked = [rule for rule in chosen.rules or reproduction.table.rules if rule in RULES]
        gate(asked or ["recurrent"])
        print(reproduce_for(reproduction, chosen.workers, chosen.minutes))


if __name__ == "__main__":
    main()
