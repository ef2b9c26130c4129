"""Block-local learning by number of blocks and kind of feedback, beside backpropagation.

    python benchmarks/bll.py resnet --seeds 0 1 --data-dir DIR --out OUT
    python benchmarks/bll.py digits --feedback learned random prototype inverted frozen --cuts 2 4 8 --seeds 0 1 2 --out OUT

Runs of a task share data, order, augmentation, initial network, AdamW at one rate, its schedule and the number of steps.
`frozen` trains the last block alone, on blocks that stay as they were drawn. Accuracy is of all test samples after the last
epoch. A finished run is a line of OUT/TASK.jsonl and is not made again.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import ledger
import numpy as np
import torch
from gate import gate
from torch import Tensor, nn

import hbll
from hbll.cut import even
from hbll.data import Samples
from hbll.recipes import RECIPES, Recipe
from hbll.train import fit
from hbll.train.evaluate import measured
from hbll.train.schedule import scheduler

TASKS: dict[str, Recipe] = {
    "digits": RECIPES["digits"](blocks=7),
    "mnist": RECIPES["mnist-normed-mlp"](blocks=7, width=128, dropout=0.0, epochs=3, train_samples=20000),
    "resnet": RECIPES["cifar10-resnet"](width=8, epochs=4, batch_size=64, train_samples=8000),
}


def initial_network(recipe: Recipe, seed: int) -> hbll.Chain:
    """The recipe's network with its embed as the first block, so that it can be cut off too."""
    network = recipe.initial_network(seed)
    layers = [network.embed] if any(True for _ in network.embed.parameters()) else []
    return hbll.Chain(nn.Identity(), [*layers, *network.blocks], network.head)


def make_rule(feedback: str, cuts: int, network: hbll.Chain, x: Tensor) -> hbll.Rule:
    """The rule of a run; freezes the network's blocks if that is asked for."""
    if feedback == "bp":
        return hbll.make_rule("bp", network)
    kind = "learned" if feedback == "frozen" else feedback
    rule = hbll.make_rule("bll", network, x, feedback=kind, stage=even(network, cuts))
    if feedback == "frozen":
        for stage in rule.stages[:-1]:
            stage.requires_grad_(False)
    return rule


def trained(recipe: Recipe, feedback: str, cuts: int, seed: int, train: Samples, test: Samples) -> dict:
    """One run, and what it came to."""
    network = initial_network(recipe, seed)
    rule = make_rule(feedback, cuts, network, train.inputs[: recipe.batch_size])
    weights = [p for p in rule.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True)
    steps = len(train) // recipe.batch_size
    schedule = scheduler(recipe.schedule, optimizer, recipe.epochs * steps)
    draw = np.random.default_rng(seed)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(recipe.epochs):
            order = torch.from_numpy(draw.permutation(len(train)))
            for index in order[: steps * recipe.batch_size].split(recipe.batch_size):
                yield recipe.augment(train.inputs[index], draw), train.labels[index]

    cost: dict[str, int] = {}

    def on_step(number: int, step: hbll.Step) -> None:
        cost.update(work=step.work, span=step.span)

    began = time.perf_counter()
    fit(rule, batches(), optimizer, schedule=schedule, on_step=on_step)
    seconds = time.perf_counter() - began
    (result,) = measured(rule, test, rule.readouts[:1], recipe.measures)
    return {
        "feedback": feedback,
        "cuts": cuts,
        "seed": seed,
        "accuracy": result["accuracy"],
        "seconds": seconds,
        **cost,
    }


def table(runs: list[dict]) -> str:
    """A row for every kind of feedback and number of blocks; work and span as shares of backpropagation's."""
    lines = ["| blocks | feedback | test accuracy, % | seeds | work | span | s |", "|---" * 7 + "|"]
    baseline = next(run for run in runs if run["feedback"] == "bp")
    for feedback, cuts in dict.fromkeys((run["feedback"], run["cuts"]) for run in runs):
        same = [run for run in runs if (run["feedback"], run["cuts"]) == (feedback, cuts)]
        accuracies = [100 * run["accuracy"] for run in same]
        lines.append(
            f"| {cuts} | {feedback} | {ledger.mean_and_spread(accuracies)} | {len(same)} "
            f"| {same[0]['work'] / baseline['work']:.2f} | {same[0]['span'] / baseline['span']:.2f} "
            f"| {statistics.mean(run['seconds'] for run in same):.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--feedback", nargs="+", default=["learned"])
    parser.add_argument("--cuts", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    gate(["bp", "bll"])
    torch.set_num_threads(1)
    recipe = TASKS[options.task]
    splits = recipe.splits(options.data_dir)
    for cuts in options.cuts:
        first = splits.train[: recipe.batch_size]
        rule = make_rule("learned", cuts, initial_network(recipe, 0), first.inputs)
        print(f"{cuts} blocks\n{hbll.audit(rule, first.inputs, first.labels)}\n", flush=True)
    file = options.out / f"{options.task}.jsonl"
    runs = ledger.read(file)
    done = {(run["feedback"], run["cuts"], run["seed"]) for run in runs}
    for seed in options.seeds:
        for feedback, cuts in [("bp", 1), *((kind, cuts) for cuts in options.cuts for kind in options.feedback)]:
            if (feedback, cuts, seed) not in done:
                runs.append(trained(recipe, feedback, cuts, seed, splits.train, splits.test))
                ledger.append(file, runs[-1])
                print(runs[-1], flush=True)
    print(table(runs))


if __name__ == "__main__":
    main()
