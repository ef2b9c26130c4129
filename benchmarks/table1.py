"""Table 1 of arXiv 2606.21497: sigmoid MLPs without skips or norm on MNIST, by backpropagation and by local rules.

    python benchmarks/table1.py --data-dir DIR --epochs 100 --layers 16 4 8 --widths 100 50 --methods paper bp tree

One process and one thread a run, as many at once as --workers. Every finished epoch is appended to OUT/table1.jsonl, and a
run whose last epoch stands there is not made again, so that an interrupted table goes on where it stopped. Batch 64, AdamW
1e-3, sigma 1, no noise, no schedule, no selection: the chain's test accuracy after the last epoch is reported.
"""

import argparse
import itertools
import multiprocessing
import time
from pathlib import Path

import ledger
import torch
from gate import gate
from torch import nn

import hbll
from hbll.data.mnist import mnist
from hbll.models.mlp import sigmoid_layer
from hbll.train import Descent

PAPER = {  # layers, width: HBLL, backpropagation
    (4, 50): (97.20, 96.68), (4, 100): (97.66, 97.29), (4, 500): (98.32, 97.98),
    (8, 50): (97.08, 95.37), (8, 100): (97.60, 96.82), (8, 500): (98.02, 96.39),
    (16, 50): (94.76, 11.32), (16, 100): (95.52, 11.32), (16, 500): (97.09, 11.32),
}  # fmt: skip


def train(job: tuple[int, int, str, int], epochs: int, data_dir: Path, out: Path) -> None:
    layers, width, method, seed = job
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    data = mnist(data_dir)
    network = hbll.Chain(
        sigmoid_layer(784, width), [sigmoid_layer(width, width) for _ in range(layers - 1)], nn.Linear(width, 10)
    )
    rule = hbll.make_rule(method, network, data.train.inputs[:64])
    descent = Descent(rule, torch.optim.AdamW(rule.parameters(), lr=1e-3, fused=True))
    started = time.perf_counter()
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(data.train)).split(64)
        batches = ((data.train.inputs[batch], data.train.labels[batch]) for batch in order)
        descent.run(batches, drain=epoch == epochs)
        with torch.no_grad():
            predicted = {path: network(data.test.inputs, path).argmax(1) for path in ("chain", "rim")}
        accuracy = {path: (found == data.test.labels).float().mean().item() for path, found in predicted.items()}
        line = {"layers": layers, "width": width, "method": method, "seed": seed, "epoch": epoch, **accuracy}
        line["seconds"] = time.perf_counter() - started
        ledger.append(out / "table1.jsonl", line)


def table(lines: list[dict], epochs: int) -> str:
    """Rows of layers and width, columns of methods: mean (and spread) over seeds at the last epoch, in percent."""
    last = [line for line in lines if line["epoch"] == epochs]
    methods = sorted({line["method"] for line in last})
    rows = [
        f"| layers | width | {' | '.join(methods)} | paper: HBLL (BP) |",
        "|---" * (3 + len(methods)) + "|",
    ]
    for layers, width in sorted({(line["layers"], line["width"]) for line in last}):
        cells = []
        for method in methods:
            found = [
                100 * line["chain"]
                for line in last
                if (line["layers"], line["width"], line["method"]) == (layers, width, method)
            ]
            seeds = f" ({len(found)} seeds)" if len(found) > 1 else ""
            cells.append(f"{ledger.mean_and_spread(found)}{seeds}" if found else "")
        published = "{:.2f} ({:.2f})".format(*PAPER[layers, width])
        rows.append(f"| {layers} | {width} | {' | '.join(cells)} | {published} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[16, 4, 8])
    parser.add_argument("--widths", type=int, nargs="+", default=[100, 50])
    parser.add_argument("--methods", nargs="+", default=["paper", "bp", "tree"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/table1"))
    options = parser.parse_args()
    gate(options.methods)

    log = options.out / "table1.jsonl"
    done = {
        (line["layers"], line["width"], line["method"], line["seed"])
        for line in ledger.read(log)
        if line["epoch"] == options.epochs
    }
    jobs = [
        (layers, width, method, seed)
        for seed, layers, width, method in itertools.product(
            options.seeds, options.layers, options.widths, options.methods
        )
        if (layers, width, method, seed) not in done
    ]
    with multiprocessing.get_context("spawn").Pool(options.workers, maxtasksperchild=1) as pool:
        arguments = [(job, options.epochs, options.data_dir, options.out) for job in jobs]
        pool.starmap(train, arguments, chunksize=1)
    print(table(ledger.read(log), options.epochs))


if __name__ == "__main__":
    main()
