"""Accuracy against wall-clock time and against samples: stages in two processes, beside backpropagation in one and in two.

    python benchmarks/wallclock.py characters --width 128 --steps 1000 --data-dir DATA [--arms ..] [--out FILE [--plot FILE]]
    python benchmarks/wallclock.py images --data-dir DATA --out FILE
    python benchmarks/wallclock.py table FILE

The networks and data of benchmarks/full_depth.py by Muon with a one-cycle schedule, the same batches in the same order for
all, a thread a process (of `bp threads=2` two). An arm is a rule and its options as there, a stage in each process; or
`DDP`; `1F1B` and `2BW`, with m=4 micro-batches unless they say another number; `DiLoCo H=50`. With `ef` there is error
feedback. Replicas split every batch between them.
Metrics are of the whole network, put together in the first process (of DiLoCo the mean of the replicas) while the clock
stands still: loss of texts, accuracy of images. The table says when each arm is first as good, on held-out samples, as
backpropagation is at its end with the same seed: seconds and samples, linear between two looks.

A run is a line of --out as soon as it ends, and not made again. Needs torch, numpy and safetensors; the plot matplotlib.
"""

import argparse
import itertools
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import full_depth
import ledger
import processes
import torch
import torch.distributed as dist
from arms import Piece, TwoVersions, loss_of, sizes_of, unfit
from gate import gate
from leaderboard import accuracy, groups
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn.parallel import DistributedDataParallel

import hbll
from hbll.distributed import Worker
from hbll.distributed.diloco import DiLoCo
from hbll.train import make_optimizers

SETTING = ("task", "blocks", "width", "batch_size", "train_samples", "steps", "rate", "looks")
"""What runs that are compared have in common."""

PROCESSES, MICROS = 2, 4
"""Those that train together, and the micro-batches of a pipeline of which nothing else is said."""

Batch = tuple[Tensor, Tensor]
Optimize = Callable[[hbll.Rule, nn.Module], list[torch.optim.Optimizer]]
"""Makes the optimizers of a module's parameters, each by the kind of part that it is of in the rule's network."""
Learn = Callable[[Sequence[Batch], Callable[[], None]], None]
"""Trains on batches; calls the second argument for every step of the optimizers, once gradients are there."""


def nothing() -> None:
    pass


@dataclass(frozen=True)
class Trained:
    """An arm under way, in one of the processes."""

    network: hbll.Chain
    optimizers: Sequence[torch.optim.Optimizer]
    clip: Callable[[], None]
    learn: Learn
    """Trains on batches, one after the other; nothing is under way when it ends."""
    whole: Callable[[], AbstractContextManager[None]] = nullcontext
    """While it is entered the network of the first process is whole."""
    finish: Callable[[], None] = nothing
    threads: int = 1
    alone: bool = False
    """Whether the first process trains by itself."""


def in_turn(
    module: nn.Module,
    walk: Callable[[Tensor, Tensor], None],
    after: Callable[[], None] = nothing,
    drain: Callable[[], None] = nothing,
) -> Learn:
    """A step a batch.

    Args:
        module: what this process trains.
        walk: gradients of a batch.
        after: what follows the optimizers' step.
        drain: ends what processes have under way.
    """

    def learn(batches: Sequence[Batch], update: Callable[[], None]) -> None:
        for x, y in batches:
            module.zero_grad()
            walk(x, y)
            update()
            after()
        drain()

    return learn


def clipping(module: nn.Module) -> Callable[[], None]:
    parameters = list(module.parameters())

    def clip() -> None:
        nn.utils.clip_grad_norm_(parameters, 1.0)

    return clip


def backpropagation(network: hbll.Chain, optimize: Optimize, threads: int = 1) -> Trained:
    """In the first process."""

    def walk(x: Tensor, y: Tensor) -> None:
        loss_of(network(x), y).backward()

    optimizers = optimize(hbll.make_rule("bp", network), network)
    return Trained(network, optimizers, clipping(network), in_turn(network, walk), threads=threads, alone=True)


def share() -> slice:
    """This process's part of a batch."""
    return slice(dist.get_rank(), None, dist.get_world_size())


def data_parallel(network: hbll.Chain, optimize: Optimize) -> Trained:
    wrapped = DistributedDataParallel(network, gradient_as_bucket_view=True)

    def walk(x: Tensor, y: Tensor) -> None:
        loss_of(wrapped(x[share()]), y[share()]).backward()

    optimizers = optimize(hbll.make_rule("bp", network), network)
    return Trained(network, optimizers, clipping(network), in_turn(network, walk))


def pieces_of(network: hbll.Chain) -> list[Piece]:
    """The network cut over the processes."""
    world = dist.get_world_size()
    return [Piece(network, sizes_of(len(network.blocks), world), place) for place in range(world)]


@contextmanager
def put_together(pieces: Sequence[Piece]) -> Iterator[None]:
    """Every process has all pieces as their owners have them."""
    for place, piece in enumerate(pieces):
        for parameter in piece.parameters():
            dist.broadcast(parameter.detach(), place)
    yield


def pipeline(network: hbll.Chain, optimize: Optimize, m: int = MICROS) -> Trained:
    """1F1B by torch, on m micro-batches; a stage's optimizer has its matrices whole, and gradients are clipped together."""
    rank, world, pieces = dist.get_rank(), dist.get_world_size(), pieces_of(network)
    own = list(pieces[rank].parameters())
    stage = PipelineStage(pieces[rank], rank, world, torch.device("cpu"))
    schedule: Any = Schedule1F1B(stage, m, loss_fn=loss_of)

    def walk(x: Tensor, y: Tensor) -> None:
        given = [x] if rank == 0 else []
        taught = {"target": y, "losses": []} if rank == world - 1 else {}
        schedule.step(*given, **taught, return_outputs=False)

    def clip() -> None:
        squares = nn.utils.get_total_norm([p.grad for p in own if p.grad is not None]) ** 2
        dist.all_reduce(squares)
        nn.utils.clip_grads_with_norm_(own, 1.0, squares.sqrt())

    optimizers = optimize(hbll.make_rule("bp", network), pieces[rank])
    learn = in_turn(pieces[rank], walk)
    return Trained(network, optimizers, clip, learn, whole=partial(put_together, pieces))


def late_pipeline(network: hbll.Chain, optimize: Optimize, m: int = MICROS) -> Trained:
    """2BW on m micro-batches: a pipeline without a flush, whose gradients are late by a step. Each stage clips its own, for
    the norm of all would be there only when the first has ended its step, and the others would wait for it."""
    rank, world, pieces = dist.get_rank(), dist.get_world_size(), pieces_of(network)
    stage = TwoVersions(pieces[rank], rank, world, m)

    def learn(batches: Sequence[Batch], update: Callable[[], None]) -> None:
        if not batches:  # between two looks
            return
        with torch.no_grad():
            state = network.embed(batches[0][0].chunk(m)[0])
        stage.run(batches, update, state)

    optimizers = optimize(hbll.make_rule("bp", network), pieces[rank])
    return Trained(network, optimizers, clipping(pieces[rank]), learn, whole=partial(put_together, pieces))


def diloco(network: hbll.Chain, optimize: Optimize, H: int) -> Trained:
    """Replicas that meet every H steps."""
    parameters = list(network.parameters())
    outer = DiLoCo(parameters, every=H)

    def walk(x: Tensor, y: Tensor) -> None:
        loss_of(network(x[share()]), y[share()]).backward()

    @contextmanager
    def whole() -> Iterator[None]:
        """The mean of the replicas, which then go on from where they were."""
        own = [p.detach().clone() for p in parameters]
        for parameter in parameters:
            dist.all_reduce(parameter.detach())
            parameter.detach().div_(dist.get_world_size())
        yield
        for parameter, value in zip(parameters, own, strict=True):
            parameter.detach().copy_(value)

    optimizers = optimize(hbll.make_rule("bp", network), network)
    return Trained(network, optimizers, clipping(network), in_turn(network, walk, outer.step), whole=whole)


def local_stages(network: hbll.Chain, optimize: Optimize, name: str, options: dict[str, Any]) -> Trained:
    """A stage in every process, which learns by itself."""
    worker = Worker(hbll.make_rule(name, network, engine="loop", **options))

    @contextmanager
    def whole() -> Iterator[None]:
        worker.gather()
        yield

    def walk(x: Tensor, y: Tensor) -> None:
        worker.backward(x, y)

    learn = in_turn(worker.module, walk, drain=worker.drain)
    optimizers = optimize(worker.rule, worker.module)
    return Trained(network, optimizers, clipping(worker.module), learn, whole=whole, finish=worker.close)


RIVALS: dict[str, Callable[..., Trained]] = {
    "bp": backpropagation,
    "DDP": data_parallel,
    "1F1B": pipeline,
    "2BW": late_pipeline,
    "DiLoCo": diloco,
}
"""The arms that are not rules in stages."""


def made(arm: str, network: hbll.Chain, rate: float) -> Trained:
    """An arm by its name."""
    name, options, feedback = full_depth.parsed(arm, network)

    def optimize(rule: hbll.Rule, module: nn.Module) -> list[torch.optim.Optimizer]:
        decay, parameters = full_depth.WEIGHT_DECAY, module.parameters()
        return make_optimizers(rule, "muon", rate, decay, error_feedback=feedback, parameters=parameters)

    if name in RIVALS:
        return RIVALS[name](network, optimize, **options)
    return local_stages(network, optimize, name, options)


def run(job: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """One training: its curve of steps, seconds and the held-out metric, and the metric on test samples, as a line."""
    task = full_depth.loaded(options, "cpu")
    torch.manual_seed(job["seed"])
    arm = made(job["rule"], task.network(job["blocks"], job["width"]), job["rate"])
    first, steps, looks = dist.get_rank() == 0, job["steps"], job["looks"]
    schedules = full_depth.one_cycle(arm.optimizers, job["rate"], steps)
    batches = task.batches(job["seed"], torch.device("cpu"))
    seconds, curve, test = 0.0, [], math.nan

    def update() -> None:
        arm.clip()
        for optimizer, schedule in zip(arm.optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()

    ends = [round(steps * look / looks) for look in range(looks + 1)]
    for begin, end in itertools.pairwise(ends):
        seen = list(itertools.islice(batches, end - begin))
        dist.barrier()
        began = time.perf_counter()
        if first or not arm.alone:
            torch.set_num_threads(arm.threads)
            arm.learn(seen, update)
            torch.set_num_threads(1)
        seconds += processes.largest(time.perf_counter() - began, torch.device("cpu"))
        with arm.whole():
            if first:
                torch.set_num_threads(2)
                arm.network.eval()
                curve.append({"step": end, "seconds": seconds, "held_out": task.measure(arm.network, "held_out")})
                test = task.measure(arm.network, "test") if end == steps else test
                arm.network.train()
                torch.set_num_threads(1)
    arm.finish()
    where = {"metric": task.metric, "commit": ledger.commit(), "torch": torch.__version__}
    return job | where | {"test": test, "curve": curve}


def reached(line: dict[str, Any], target: float) -> tuple[float, float] | None:
    """Seconds and steps after which a run is first as good on held-out samples, linear between two looks; at the first look
    those of the look; None if it never is."""
    before = None
    for point in line["curve"]:
        found = point["held_out"]
        if found >= target if accuracy(line) else found <= target:
            if before is None:
                return point["seconds"], point["step"]
            part = (target - before["held_out"]) / (found - before["held_out"])
            seconds, step = (before[key] + part * (point[key] - before[key]) for key in ("seconds", "step"))
            return seconds, step
        before = point
    return None


COLUMNS = ("", "seeds", "seconds a step", "held-out", "test", "seconds to bp's held-out", "samples", "bp's seconds = 1")


def table(lines: Sequence[dict[str, Any]]) -> str:
    """For every setting the arms, with the mean and standard deviation over seeds."""
    found = []
    for setting, runs in groups(lines, *SETTING).items():
        named = dict(zip(SETTING, setting, strict=True))
        metric = "accuracy, %" if accuracy(runs[0]) else "loss"
        title = "{task}: {blocks} blocks of width {width}, {steps} steps of {batch_size}, rate {rate:g}".format(**named)
        exact = {run["seed"]: run for run in runs if run["rule"] == "bp"}
        rows = [row(arm, exact) for arm in groups(runs, "rule").values()]
        found.append(
            "\n".join([f"{title} ({metric})\n", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", *rows])
        )
    return "\n\n".join(found)


def row(runs: Sequence[dict[str, Any]], exact: dict[int, dict[str, Any]]) -> str:
    """An arm's row.

    Args:
        exact: backpropagation's runs by seed.
    """
    scale, shown = (100, ledger.mean_and_spread) if accuracy(runs[0]) else (1, in_four_places)
    held_out = [scale * run["curve"][-1]["held_out"] for run in runs]
    pace = statistics.mean(run["curve"][-1]["seconds"] / run["steps"] for run in runs)
    cells = [
        runs[0]["rule"],
        str(len(runs)),
        f"{pace:.4f}",
        shown(held_out),
        shown([scale * run["test"] for run in runs]),
    ]
    beside = [(run, exact[run["seed"]]) for run in runs if run["seed"] in exact]
    targets = [(run, bp, bp["curve"][-1]["held_out"]) for run, bp in beside]
    times = [(reached(run, target), reached(bp, target), run["batch_size"]) for run, bp, target in targets]
    met = [(own, bp, size) for own, bp, size in times if own and bp]
    if not met:
        return f"| {' | '.join(cells)} | {'never' if times else '-'} | - | - |"
    some = "" if len(met) == len(times) else f" ({len(met)} of {len(times)} seeds)"
    seconds = ledger.mean_and_spread([own[0] for own, _, _ in met])
    samples = statistics.mean(own[1] * size for own, _, size in met)
    ratio = ledger.mean_and_spread([own[0] / bp[0] for own, bp, _ in met])
    return f"| {' | '.join(cells)} | {seconds}{some} | {samples:.0f} | {ratio} |"


def in_four_places(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"


def plot(lines: Sequence[dict[str, Any]], file: Path) -> None:
    """Held-out perplexity or accuracy against seconds and against samples, a line an arm and seed."""
    import matplotlib.pyplot as plt  # an extra, which the plot alone needs

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, constrained_layout=True)
    colors = itertools.cycle(plt.rcParams["axes.prop_cycle"].by_key()["color"])
    for (name,), runs in groups(lines, "rule").items():
        color = next(colors)
        for i, line in enumerate(runs):
            values = [100 * p["held_out"] if accuracy(line) else math.exp(p["held_out"]) for p in line["curve"]]
            samples = [point["step"] * line["batch_size"] for point in line["curve"]]
            look = {"color": color, "marker": ".", "label": name if i == 0 else None}
            left.plot([point["seconds"] for point in line["curve"]], values, **look)
            right.plot(samples, values, **look)
    left.set(xlabel="seconds of training", ylabel=f"held-out {'accuracy, %' if accuracy(lines[0]) else 'perplexity'}")
    right.set(xlabel="samples")
    right.legend(frameon=False)
    figure.savefig(file, dpi=150)


def jobs(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The runs that are asked for."""
    task = full_depth.TASKS[options.task]
    setting = {"task": options.task, "blocks": options.blocks, "width": options.width or task.width}
    setting |= {"batch_size": options.batch_size or task.batch_size, "steps": options.steps, "rate": options.rate}
    setting |= {"looks": options.looks, "train_samples": options.train_samples if options.task == "images" else None}
    return [setting | {"rule": arm, "seed": seed} for seed, arm in itertools.product(options.seeds, options.arms)]


def missing(lines: Sequence[dict[str, Any]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The runs that are not among the lines."""
    return [job for job in jobs(options) if not any(job.items() <= line.items() for line in lines)]


def report(lines: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    """The table and plot of all runs in the setting that was asked for."""
    setting = [jobs(options)[0][key] for key in SETTING]
    alike = [line for line in lines if [line[key] for key in SETTING] == setting]
    print(table(alike), flush=True)
    if options.plot:
        plot(alike, options.plot)


def train(options: argparse.Namespace) -> None:
    """Makes the runs that are missing, in one of the processes."""
    processes.join()
    torch.set_num_threads(1)
    first = dist.get_rank() == 0
    known = [ledger.read(options.out) if first and options.out else []]
    dist.broadcast_object_list(known)
    (lines,) = known
    for job in missing(lines, options):
        line = run(job, options)
        if first:
            last = line["curve"][-1]
            print(f"{job['rule']}, seed {job['seed']}: {last['seconds']:.1f} s, {last['held_out']:.4f}", flush=True)
            lines.append(line)
            if options.out:
                ledger.append(options.out, line)
    if first:
        report(lines, options)
    dist.barrier()
    processes.leave()


ARMS = ["bp", "bp threads=2", "DDP", "1F1B", "2BW ef", "DiLoCo H=50", "DiLoCo H=500"]
ARMS += ["stream (3,4) copies", "stream (3,4) copies readout_depth=2", "solo (2,5) refresh=16"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="task", required=True)
    commands.add_parser("table").add_argument("file", type=Path, help="lines of --out")
    for task in ("characters", "subwords", "novels", "images"):
        command = commands.add_parser(task)
        command.add_argument("--arms", nargs="+", default=ARMS)
        command.add_argument("--seeds", type=int, nargs="+", default=[0])
        command.add_argument("--blocks", type=int, default=7)
        command.add_argument("--width", type=int, help="by default that of benchmarks/full_depth.py")
        command.add_argument("--batch-size", type=int, help="by default 128 images, or 16 texts")
        command.add_argument("--steps", type=int, default=1000)
        command.add_argument("--rate", type=float, default=8e-3)
        command.add_argument("--looks", type=int, default=10, help="at held-out samples during a run")
        command.add_argument("--train-samples", type=int, default=20000, help="images, 45,000 at most")
        command.add_argument("--data-dir", type=Path, required=True)
        command.add_argument("--out", type=Path, help="file for the runs, a JSON object a line")
        command.add_argument("--plot", type=Path, help="a picture of the runs")
        command.set_defaults(augment=False)
    options = parser.parse_args()
    if options.task == "table":
        print(table(ledger.read(options.file)))
        return 0
    size = options.batch_size or full_depth.TASKS[options.task].batch_size
    for arm in options.arms:
        said = re.search(r"\bm=(\d+)", arm)
        reason = unfit(size, int(said[1]) if said else MICROS, PROCESSES)
        if arm.split()[0] in ("1F1B", "2BW") and reason:
            parser.error(f"{arm!r}: {reason}")
    if processes.launched():
        train(options)
    known = ledger.read(options.out) if options.out else []
    if not missing(known, options):
        report(known, options)
        return 0
    gate({arm.split()[0] for arm in options.arms} - RIVALS.keys() | {"bp"})
    return processes.launch(PROCESSES)


if __name__ == "__main__":
    raise SystemExit(main())
