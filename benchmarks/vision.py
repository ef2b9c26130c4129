"""One run of a recipe where there is no command line (torch, numpy and safetensors alone), and a table of several.

    python benchmarks/vision.py train cifar10-vit stream --preset paper --minutes 5 --folder runs/stream
    python benchmarks/vision.py table runs/bp runs/stream

`--options '{"epochs": 40}'` goes before the preset's options. The folder is one that `hbll evaluate` and `hbll report` know.
After so many minutes the run is saved where it stands; the same call goes on. Byte pairs need the library tokenizers.
"""

import argparse
import json
import signal
import time
from pathlib import Path

from hbll.recipes import RECIPES
from hbll.train import metrics
from hbll.train.loop import Interrupted, train
from hbll.train.metrics import Metrics
from hbll.train.run import Run, open_run


def run_for(run: Run, minutes: float) -> None:
    """Trains until the last epoch, or saves where the run stands after so many minutes."""
    end = time.monotonic() + 60 * minutes

    def on_step(done: int, steps: int) -> None:
        if time.monotonic() > end:
            signal.raise_signal(signal.SIGINT)

    def on_epoch(line: Metrics) -> None:
        name = run.recipe.measures[0].name
        print(f"{run.method} epoch {line.epoch}: {name} {line.chain[name]}, {line.seconds:.1f} s", flush=True)

    try:
        train(run, resume=run.configuration_file.exists(), on_step=on_step, on_epoch=on_epoch)
    except Interrupted:
        print(f"{run.method}: stopped after {minutes} minutes")


def table(folders: list[Path]) -> str:
    """What every run came to after its last finished epoch, path by path; seconds are of an epoch's training steps."""
    rows = ["| recipe | rule | epochs | seconds an epoch | work | span | path | measures |", "|---" * 8 + "|"]
    for folder in folders:
        run, history = open_run(folder), metrics.read(folder / "metrics.jsonl")
        for path in history[-1].paths if history else []:
            seconds = sum(line.seconds for line in history) / len(history)
            values = ", ".join(f"{one.title} {one.text(path[one.name])}" for one in run.recipe.measures)
            epochs, cost = f"{len(history)} of {run.recipe.epochs}", f"{history[-1].work:.1f} | {history[-1].span:.1f}"
            rows.append(
                f"| {run.recipe.name} | {run.method} | {epochs} | {seconds:.2f} | {cost} | {path['path']} | {values} |"
            )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    one = actions.add_parser("train")
    one.add_argument("recipe", choices=RECIPES)
    one.add_argument("rule")
    one.add_argument("--preset", default="small")
    one.add_argument("--options", type=json.loads, default={}, help="of the recipe, as JSON")
    one.add_argument("--minutes", type=float, default=float("inf"))
    one.add_argument("--folder", type=Path, required=True)
    several = actions.add_parser("table")
    several.add_argument("folders", type=Path, nargs="+")
    chosen = parser.parse_args()
    if chosen.action == "table":
        print(table(chosen.folders))
        return
    given = {option: tuple(value) if isinstance(value, list) else value for option, value in chosen.options.items()}
    recipe = RECIPES[chosen.recipe].of_preset(chosen.preset, **given)
    recipe.check([chosen.rule])
    run_for(Run(recipe=recipe, method=chosen.rule, seed=0, folder=chosen.folder), chosen.minutes)


if __name__ == "__main__":
    main()
