"""Table 1 of arXiv 2606.21497: sigmoid MLPs without skips or norm on MNIST, by backpropagation and by local rules.

    python benchmarks/table1.py --data-dir DIR --epochs 100 --layers 16 4 8 --widths 100 50 --methods paper bp tree

One process and one thread a run, as many at once as --workers. Every finished epoch is appended to OUT/table1.jsonl, and a
run of so many epochs whose last one stands there is not made again: an interrupted table goes on where it stopped. Batch
64, AdamW 1e-3, sigma 1, no noise, a constant rate, no selection: the chain's test accuracy after the last epoch is reported.

    python benchmarks/table1.py --data-dir DIR --epochs 40 --layers 16 --widths 50 --methods tree --written-out --look 4

A method may have options of its rule, as an arm of full_depth.py has. With --schedule cosine the rate falls to 0 at the last
epoch. --look N adds to every N-th line what tells where the chain loses, see ``look``, and its accuracy by a running mean of
the weights over about 1,000 steps (``average``). --written-out trains `paper` and `tree` by written_out.py, several times as
fast, once its gradients of a batch have been found to be the rule's to 1e-9.
"""

import argparse
import itertools
import math
import multiprocessing
import time
from pathlib import Path
from typing import Any

import ledger
import torch
from full_depth import parsed
from gate import gate
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from written_out import WrittenOut

import hbll
from hbll.calls import PathLike
from hbll.data import Samples, Splits
from hbll.data.mnist import mnist
from hbll.models.mlp import sigmoid_layer
from hbll.rules.tree import Tree
from hbll.train.schedule import scheduler

PAPER = {  # layers, width: HBLL, backpropagation
    (4, 50): (97.20, 96.68), (4, 100): (97.66, 97.29), (4, 500): (98.32, 97.98),
    (8, 50): (97.08, 95.37), (8, 100): (97.60, 96.82), (8, 500): (98.02, 96.39),
    (16, 50): (94.76, 11.32), (16, 100): (95.52, 11.32), (16, 500): (97.09, 11.32),
}  # fmt: skip


@torch.no_grad()
def look(rule: hbll.Rule, data: Splits) -> dict[str, Any]:
    """Where the chain and the tree part.

    Accuracy of chain and rim over 10,000 training samples; over test samples that of the paths that are the chain up to a
    node of the rim and the rim from there (``mixed``, the first of which is the rim and the last the chain), and per block
    how far the chain's state is from that of the tree, squared, as a share of the latter's variance (``gap``). Per block,
    over 512 training samples, the cosine with backpropagation's gradient on the chain.
    """
    network, tree = rule.network, rule.network.tree
    found: dict[str, Any] = {}
    train = data.train[:10_000]
    for path in ("chain", "rim"):
        found[f"{path}_train"] = accuracy(network, train, path)
    mixed = [tree.rim, *((*range(1, node + 1), *tree.rim[k:]) for k, node in enumerate(tree.rim, 1))]
    found["mixed"] = [accuracy(network, data.test, path) for path in mixed]
    state, _ = network.embedded(data.test.inputs)
    of_tree: dict[int, Tensor] = {0: state}
    for node in itertools.chain(*tree.levels):
        of_tree[node] = network.blocks[node - 1](of_tree[tree.left(node)])
    found["gap"] = []
    for node in tree.chain:
        state = network.blocks[node - 1](state)
        variance = of_tree[node].var(0, correction=0).sum()
        found["gap"].append(((state - of_tree[node]).square().sum(1).mean() / variance).item())
    reports = rule.diagnose(data.train.inputs[:512], data.train.labels[:512])
    found["cosine"] = [report.cosine for report in reports.values()]
    return found


@torch.no_grad()
def accuracy(network: nn.Module, samples: Samples, path: PathLike) -> float:
    return (network(samples.inputs, path).argmax(1) == samples.labels).float().mean().item()


def train(job: dict[str, Any], options: argparse.Namespace) -> None:
    layers, width, method = job["layers"], job["width"], job["method"]
    torch.set_num_threads(1)
    torch.manual_seed(job["seed"])
    data = mnist(options.data_dir)
    network = hbll.Chain(
        sigmoid_layer(784, width), [sigmoid_layer(width, width) for _ in range(layers - 1)], nn.Linear(width, 10)
    )
    name, chosen, feedback = parsed(method, network)
    if feedback:
        raise ValueError(f"{method!r}: the optimizer is AdamW for all, without error feedback")
    rule = hbll.make_rule(name, network, data.train.inputs[:64], **chosen)
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.999)) if options.look else None
    taught, parameters = rule, list(rule.parameters())
    if options.written_out and isinstance(rule, Tree):
        deviation = WrittenOut.deviation(rule, data.train.inputs[:64], data.train.labels[:64])
        if deviation > 1e-9:
            raise ValueError(f"{method} is not what is written out: gradients differ by {deviation:.1e}")
        taught = WrittenOut(rule)
        parameters = taught.parameters
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    steps = options.epochs * math.ceil(len(data.train) / 64)
    schedule = scheduler(options.schedule, optimizer, steps)
    started = time.perf_counter()
    for epoch in range(1, options.epochs + 1):
        order = torch.randperm(len(data.train)).split(64)
        batches = ((data.train.inputs[batch], data.train.labels[batch]) for batch in order)
        for x, y in batches:
            optimizer.zero_grad()
            taught.backward(x, y)
            optimizer.step()
            schedule.step()
            if average:
                average.update_parameters(network)
        line = job | {"epoch": epoch}
        line |= {path: accuracy(network, data.test, path) for path in ("chain", "rim")}
        line["seconds"] = time.perf_counter() - started
        if average and epoch % options.look == 0:
            line |= look(rule, data) | {"average": accuracy(average, data.test, "chain")}
        ledger.append(options.out / "table1.jsonl", line)


def table(last: list[dict]) -> str:
    """Rows of layers and width, columns of methods: mean (and spread) over seeds of lines of a last epoch, in percent."""
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
        published = "{:.2f} ({:.2f})".format(*PAPER[layers, width]) if (layers, width) in PAPER else ""
        rows.append(f"| {layers} | {width} | {' | '.join(cells)} | {published} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[16, 4, 8])
    parser.add_argument("--widths", type=int, nargs="+", default=[100, 50])
    parser.add_argument("--methods", nargs="+", default=["paper", "bp", "tree"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--schedule", choices=["constant", "cosine"], default="constant", help="of the learning rate")
    parser.add_argument("--look", type=int, default=0, help="look at states and gradients every so many epochs")
    parser.add_argument("--written-out", action="store_true", help="train paper and tree by written_out.py")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/table1"))
    options = parser.parse_args()
    gate(method.split()[0] for method in options.methods)

    log = options.out / "table1.jsonl"
    keys = ("seed", "layers", "width", "method")
    words = ("schedule", "epochs", "written_out", "look")
    budget = {word: getattr(options, word) for word in words}
    jobs = [
        dict(zip(keys, job, strict=True)) | budget
        for job in itertools.product(options.seeds, options.layers, options.widths, options.methods)
    ]

    def made(job: dict[str, Any]) -> dict | None:
        return ledger.find(ledger.read(log), job | {"epoch": options.epochs})

    with multiprocessing.get_context("spawn").Pool(options.workers, maxtasksperchild=1) as pool:
        pool.starmap(train, [(job, options) for job in jobs if made(job) is None], chunksize=1)
    print(table([line for job in jobs if (line := made(job)) is not None]))


if __name__ == "__main__":
    main()
