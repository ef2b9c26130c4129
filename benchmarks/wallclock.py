"""Accuracy against wall-clock time: stages in two processes, beside backpropagation in one and in two.

    python benchmarks/wallclock.py characters --width 128 --steps 600 --data-dir DATA [--arms ..] [--out FILE [--plot FILE]]

A GPT of 7 blocks by Muon with a one-cycle schedule, the same batches in the same order for all, a thread a process (two for
`bp, two threads`). Held-out loss is taken several times in a run, by the chain put together in the first process, while the
clock stands still. DDP splits the batch, a stage takes all of it. Needs torch and numpy alone; the plot matplotlib.
"""

import argparse
import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import full_depth
import ledger
import processes
import torch
import torch.distributed as dist
import torch.nn.functional as F
from gate import gate
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import hbll
from hbll.distributed import Worker
from hbll.train import make_optimizers


class Trained(NamedTuple):
    """An arm under way, in one of the processes."""

    network: hbll.Chain
    optimizers: list[torch.optim.Optimizer]
    parameters: list[nn.Parameter]
    walk: Callable[[Tensor, Tensor], None]
    """Gradients of a batch."""
    gather: Callable[[], None]
    """Puts the weights together in the first process."""
    finish: Callable[[], None]
    threads: int = 1
    alone: bool = False
    """Whether the first process trains by itself."""


def made(name: str, network: hbll.Chain, rate: float) -> Trained:
    """An arm by its name."""
    rule_name, options, _ = full_depth.parsed(name.removesuffix(", two threads"), network)
    if rule_name == "DDP":
        rule = hbll.make_rule("bp", network)
        wrapped = DistributedDataParallel(network, gradient_as_bucket_view=True)
        share = slice(dist.get_rank(), None, dist.get_world_size())

        def parallel(x: Tensor, y: Tensor) -> None:
            F.cross_entropy(wrapped(x[share]).flatten(0, 1), y[share].flatten()).backward()

        walk, optimizers = parallel, make_optimizers(rule, "muon", rate, full_depth.WEIGHT_DECAY)
        return Trained(network, optimizers, list(network.parameters()), walk, _nothing, _nothing)
    if rule_name == "bp":
        rule = hbll.make_rule("bp", network)

        def alone(x: Tensor, y: Tensor) -> None:
            F.cross_entropy(network(x).flatten(0, 1), y.flatten()).backward()

        optimizers = make_optimizers(rule, "muon", rate, full_depth.WEIGHT_DECAY)
        threads = 2 if name.endswith("two threads") else 1
        return Trained(network, optimizers, list(network.parameters()), alone, _nothing, _nothing, threads, alone=True)
    rule = hbll.make_rule(rule_name, network, engine="loop", **options)
    # Before other stages' weights are let go: what is left of them in the optimizers gets no gradients.
    optimizers = make_optimizers(rule, "muon", rate, full_depth.WEIGHT_DECAY)
    worker = Worker(rule)

    def stage(x: Tensor, y: Tensor) -> None:
        worker.backward(x, y)

    return Trained(network, optimizers, list(worker.parameters()), stage, worker.gather, worker.finish)


def _nothing() -> None:
    pass


def run(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One training: its curve of seconds, steps and held-out loss, and the loss on test samples."""
    task = full_depth.loaded(options, "cpu")
    torch.manual_seed(seed)
    arm = made(name, task.network(options.blocks, options.width), options.rate)
    first = dist.get_rank() == 0
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(o, options.rate, options.steps, pct_start=0.05, cycle_momentum=False)
        for o in arm.optimizers
    ]
    batches = itertools.islice(task.batches(seed, torch.device("cpu")), options.steps)
    seconds, curve = 0.0, []
    for look in range(1, options.looks + 1):
        count = options.steps * look // options.looks - options.steps * (look - 1) // options.looks
        seen = list(itertools.islice(batches, count))
        dist.barrier()
        began = time.perf_counter()
        if first or not arm.alone:
            torch.set_num_threads(arm.threads)
            for x, y in seen:
                for optimizer in arm.optimizers:
                    optimizer.zero_grad()
                arm.walk(x, y)
                nn.utils.clip_grad_norm_(arm.parameters, 1.0)
                for optimizer, schedule in zip(arm.optimizers, schedules, strict=True):
                    optimizer.step()
                    schedule.step()
            torch.set_num_threads(1)
        seconds += processes.largest(time.perf_counter() - began, torch.device("cpu"))
        arm.gather()
        if first:
            torch.set_num_threads(2)
            held_out = task.measure(arm.network.eval(), "held_out")
            arm.network.train()
            torch.set_num_threads(1)
            curve.append({"step": options.steps * look // options.looks, "seconds": seconds, "held_out": held_out})
    test = task.measure(arm.network.eval(), "test") if first else None
    arm.finish()
    return {"rule": name, "seed": seed, "width": options.width, "steps": options.steps, "curve": curve, "test": test}


def plot(lines: list[dict[str, Any]], file: Path) -> None:
    """Held-out perplexity against seconds, a line an arm and seed."""
    import matplotlib.pyplot as plt  # an extra, which the plot alone needs

    figure, axes = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    for color, (name, runs) in zip(
        itertools.cycle(plt.rcParams["axes.prop_cycle"].by_key()["color"]),
        full_depth.leaderboard.groups(lines, "rule").items(),
        strict=False,
    ):
        for i, line in enumerate(runs):
            points = [(point["seconds"], math.exp(point["held_out"])) for point in line["curve"]]
            axes.plot(*zip(*points, strict=True), color=color, marker=".", label=name[0] if i == 0 else None)
    axes.set(xlabel="seconds of training", ylabel="held-out perplexity")
    axes.legend(frameon=False)
    figure.savefig(file, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["characters", "subwords", "novels"])
    parser.add_argument(
        "--arms",
        nargs="+",
        default=["bp", "bp, two threads", "DDP", "stream (3,4) copies", "solo (3,4) refresh=16"],
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rate", type=float, default=8e-3)
    parser.add_argument("--looks", type=int, default=8)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="file for the runs, a JSON object a line")
    parser.add_argument("--plot", type=Path, help="a picture of all runs in --out")
    options = parser.parse_args()
    if options.plot and not options.out:
        parser.error("--plot is of the runs in --out: give that too")
    if not processes.launched():
        gate({name.replace(",", " ").split()[0] for name in options.arms} - {"DDP"} | {"bp"})
        return processes.launch(2)
    processes.join()
    torch.set_num_threads(1)
    for seed, name in itertools.product(options.seeds, options.arms):
        line = run(name, seed, options)
        if dist.get_rank() == 0:
            last = line["curve"][-1]
            print(f"{name}, seed {seed}: {last['seconds']:.1f} s, held-out {last['held_out']:.4f}", flush=True)
            if options.out:
                ledger.append(options.out, line)
    if dist.get_rank() == 0 and options.plot:
        plot(ledger.read(options.out), options.plot)
    dist.barrier()
    processes.leave()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
