"""The best rate of every rule and optimizer, task by task, from the lines of benchmarks/full_depth.py.

    python benchmarks/leaderboard.py benchmarks/results/full_depth.jsonl > docs/leaderboard.md

A setting is a task with its budget; the row of a rule and optimizer is at the learning rate with the best mean on held-out
training samples over the seeds that all its rates have. An asterisk says that it is the highest or lowest one tried.
"""

import argparse
import math
import statistics
from collections.abc import Iterable
from pathlib import Path

import ledger

from hbll.train import rates

SETTING = ("task", "blocks", "width", "samples", "batch_size", "steps", "augment")

INTRODUCTION = """# Leaderboard

Made by `python benchmarks/leaderboard.py` from the lines of `benchmarks/full_depth.py`; do not edit. Mean and standard
deviation over seeds, on test samples, which chose nothing: learning rates are those with the best result on held-out
training samples (* the highest or lowest one tried). Span and work are counted, as shares of backpropagation's; MiB are the
peak of a step beside weights, gradients and optimizer; those of `2bw` are of one device that makes the whole step: on
two it waits for half of the span, and holds two versions of the weights. The cosine is that of stage 1's gradient with
backpropagation's, early and late in the training. These are of the row's first run; seconds are of its runs on the device
named, which others may have shared, and not comparable.
"""


def accuracy(line: dict) -> bool:
    """Whether more is better."""
    return line["metric"] == "accuracy"


def perplexity(loss: float) -> float:
    """Of a loss in nats, infinite where there is no float for it."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def groups(lines: Iterable[dict], *keys: str) -> dict[tuple, list[dict]]:
    """The lines by what they have under these keys, in the order in which that came first."""
    found: dict[tuple, list[dict]] = {}
    for line in lines:
        found.setdefault(tuple(line[key] for key in keys), []).append(line)
    return found


def score(runs: list[dict], part: str) -> float:
    """The mean of runs, larger if better; of runs that diverged the worst there is."""
    mean = statistics.mean(run[part] for run in runs)
    return -math.inf if math.isnan(mean) else mean if accuracy(runs[0]) else -mean


def scores(runs: list[dict]) -> dict[float, float]:
    """By learning rate the mean on held-out samples, over the seeds that all rates have."""
    by_rate = groups(runs, "rate")
    seeds = set.intersection(*({run["seed"] for run in tried} for tried in by_rate.values()))
    return {
        rate: score([run for run in tried if run["seed"] in seeds], "held_out") for (rate,), tried in by_rate.items()
    }


def row(runs: list[dict], exact: dict | None) -> tuple[float, str]:
    """The row of a rule and optimizer, and what it is sorted by."""
    rate, edge = rates.best_rate(scores(runs))
    found = [run for run in runs if run["rate"] == rate]
    first = found[0]
    shown = ledger.mean_and_spread([100 * run["test"] if accuracy(run) else perplexity(run["test"]) for run in found])
    cosines = [point["cosine"][0] for point in first["curve"] if point["cosine"]]
    cosine = "-" if not cosines else f"{cosines[0]:.2f}, {cosines[-1]:.2f}"
    share = ["-", "-"] if exact is None else [f"{first[what] / exact[what]:.2f}" for what in ("span", "work")]
    seconds = statistics.mean(run["seconds"] for run in found if run["device"] == first["device"])
    cells = [first["rule"], first["optimizer"], f"{rate:g}{'*' if edge else ''}", shown, str(len(found)), *share]
    commits = ", ".join(dict.fromkeys(run["commit"] or "-" for run in found))
    cells += [f"{first['peak_mib']:.0f}", cosine, f"{seconds:.0f} ({first['device']})", commits]
    return score(found, "test"), f"| {' | '.join(cells)} |"


def tables(lines: list[dict]) -> str:
    """A table for every setting, its best row first."""
    found = []
    for setting, runs in groups(lines, *SETTING).items():
        named = dict(zip(SETTING, setting, strict=True))
        metric = "accuracy, %" if accuracy(runs[0]) else "perplexity"
        title = "## {task}: {blocks} blocks of width {width}, {steps} steps of {batch_size}".format(**named)
        title += f", {named['samples']} samples" * bool(named["samples"]) + ", augmented" * bool(named["augment"])
        head = ["rule", "optimizer", "rate", metric, "seeds", "span", "work", "MiB", "cosine", "s", "commit"]
        exact = next((run for run in runs if run["rule"] == "bp"), None)
        rows = [row(tried, exact) for tried in groups(runs, "rule", "optimizer").values()]
        body = [text for _, text in sorted(rows, key=lambda scored: -scored[0])]
        found.append("\n".join([title, "", f"| {' | '.join(head)} |", "|---" * len(head) + "|", *body]))
    return "\n\n".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="lines of benchmarks/full_depth.py")
    options = parser.parse_args()
    print(f"{INTRODUCTION}\n{tables([line for file in options.files for line in ledger.read(file)])}")


if __name__ == "__main__":
    main()
