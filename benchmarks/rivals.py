"""All training rules on one network, with one budget, each at the learning rate that suits it.

    python benchmarks/rivals.py mnist --rates 5e-4 2e-3 8e-3 3e-2 --data-dir DIR --out OUT
    python benchmarks/rivals.py cifar10 --rates 1e-3 4e-3 --tune-samples 4000 --data-dir DIR --out OUT

Rules share data, order, augmentation, initial network, AdamW and its schedule. A rule's rate is the one of --rates at which
one epoch over --tune-samples gives the highest accuracy on 2,000 training samples that no run trains on, or the next one
while it is the highest or lowest; test samples decide nothing. The table is of --seeds runs at that rate. Finished runs in
OUT are not made again. MiB are the peak of a step by rule.backward, beside weights, gradients and optimizer (until commit
a4cb712 with the gradients).
"""

import argparse
import math
from dataclasses import replace
from pathlib import Path

import torch
from gate import gate

from hbll.recipes import RECIPES, Recipe
from hbll.train.compare import Comparison, MethodResult, compare
from hbll.train.divergence import DivergedError
from hbll.train.evaluate import measured
from hbll.train.loop import Training
from hbll.train.rates import best_rate, next_rate
from hbll.train.run import Run

METHODS = ["bp", "paper", "tree", "scan", "stream", "pipeline", "bll", "dgl", "predsim", "cff", "ff", "dfa"]

TASKS: dict[str, Recipe] = {
    "mnist": RECIPES["mnist-normed-mlp"](blocks=7, width=128, dropout=0.0, epochs=3, train_samples=20000),
    "cifar10": RECIPES["cifar10-conv"](blocks=7, width=32, batch_size=64, epochs=1, train_samples=16000),
}

HELD_OUT = 2000


def tuned_rate(recipe: Recipe, method: str, options: argparse.Namespace) -> float:
    """The rate with the highest accuracy of the chain on training samples behind those that are trained on; while it is
    the highest or lowest one, the next is tried, too."""
    whole = recipe.load(options.data_dir).train
    held_out = whole[recipe.train_samples :][:HELD_OUT]
    accuracy: dict[float, float] = {}
    due = list(options.rates)
    while due:
        rate = due.pop()
        tried = replace(recipe, learning_rate=rate, epochs=1)
        run = Run(recipe=tried, method=method, seed=0, folder=options.out)
        training = Training(run, whole[: options.tune_samples])
        training.save()  # from where a divergence is looked at
        try:
            training.go_on()
            chain = training.rule.readouts[:1]
            accuracy[rate] = measured(training.rule, held_out, chain, tried.measures[:1])[0]["accuracy"]
        except DivergedError:
            accuracy[rate] = math.nan
        if not due and (beyond := next_rate(accuracy)) is not None:
            due = [beyond]
    print(f"{method}: " + ", ".join(f"{100 * found:.1f} % at {rate:g}" for rate, found in accuracy.items()), flush=True)
    return best_rate(accuracy)[0]


def table(rows: list[tuple[float, MethodResult]]) -> str:
    """Work and span as shares of backpropagation's, which comes first; other readouts than the chain in brackets."""
    baseline = rows[0][1]
    lines = ["| method | rate | test accuracy, % | s | work | span | MiB | local |", "|---" * 8 + "|"]
    for rate, result in rows:
        spread = "" if result["spread"] is None else f" ± {100 * result['spread']:.2f}"
        others = [
            f"{path['path']} {100 * path['accuracy']:.2f}" for path in result["paths"] if path["path"] == "goodness"
        ]
        lines.append(
            f"| {result['method']} | {rate:g} | {100 * result['accuracy']:.2f}{spread}{''.join(f' ({o})' for o in others)} "
            f"| {result['seconds']:.0f} | {result['work'] / baseline['work']:.2f} | {result['span'] / baseline['span']:.2f} "
            f"| {result['memory'] / 2**20:.1f} | {result['local']} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--tune-samples", type=int, default=10000)
    parser.add_argument("--rates", nargs="+", type=float, default=[5e-4, 2e-3, 8e-3, 3e-2])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, help="of the runs in the table, instead of the task's own number")
    options = parser.parse_args()
    gate(options.methods)
    torch.set_num_threads(1)
    recipe, rows = TASKS[options.task], []
    recipe = replace(recipe, epochs=options.epochs or recipe.epochs)
    for method in options.methods:
        rate = tuned_rate(recipe, method, options)
        comparison = Comparison(
            recipe=replace(recipe, learning_rate=rate),
            methods=[method],
            seeds=options.seeds,
            folder=options.out / f"{method}-{rate:g}",
            data_dir=options.data_dir,
        )
        rows.append((rate, *compare(comparison, resume=comparison.file.exists())))
        print(table(rows), flush=True)


if __name__ == "__main__":
    main()
