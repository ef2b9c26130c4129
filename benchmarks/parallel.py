"""Seconds of a training step in several processes: measured, emulated, simulated.

    python benchmarks/parallel.py rivals --widths 128 256 --batches 1 4 16 [--arms ..] [--out rivals.jsonl]
    python benchmarks/parallel.py rivals --mbit 100 --delay-ms 20    # on each of two hosts, RANK and all else being set
    python benchmarks/parallel.py table rivals.jsonl
    python benchmarks/parallel.py emulate --block-seconds 0.02 --stages 2 4 8 16 32
    python benchmarks/parallel.py accounting

`rivals` trains a GPT of 7 blocks on batches of 128 characters, in two processes of a thread each, which it starts itself
unless RANK and WORLD_SIZE are set (torchrun, two hosts). Every way is first checked against plain backpropagation, or the
same stages in one process, in float64; if one is wrong, there is no table. All are then timed in turn, several rounds, from
a barrier to the end of the last process; the median round counts. A timing is a line of --out as soon as it is there, and a
row is printed with its last round; `table` makes the table of what is in the file. Bytes are those that the network
interface sent, of all processes; on the loopback whatever else runs on the machine is among them. Beside them is what the
simulation makes of the costs of the network's parts, measured in the first process alone, and of the link that --mbit and
--delay-ms name.

`emulate` has processes sleep in place of arithmetic, everything else being as it is, beside the simulation: stages that
learn by themselves are trained by workers, with their links, copies and refreshes; of the others the schedule's operations
are run with messages of their size. `accounting` prints the time that each scheme takes on equal stages, in units of one
device's, from the cost model. Needs torch, numpy and safetensors alone.
"""

import argparse
import contextlib
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import ledger
import processes
import sleeping
import torch
import torch.distributed as dist
from arms import ARMS, Arm, Config, local_sizes
from leaderboard import groups
from torch import Tensor

from hbll.distributed.cost import (
    SCHEMES,
    Costs,
    Estimate,
    Priced,
    by_backpropagation,
    by_data,
    by_late_pipeline,
    by_local_stages,
    by_pipeline,
    by_tree,
    by_zero_bubble,
    equal,
    estimate,
    sent,
    step_seconds,
)
from hbll.distributed.measure import measured_costs
from hbll.distributed.simulate import Network, Op, Span, period, simulate
from hbll.losses import cross_entropy

TOLERANCE = 1e-9
"""The largest difference from plain backpropagation that passes, in float64."""


def rivals(options: argparse.Namespace) -> None:
    """The table of seconds a step."""
    rank, world, device = processes.join()
    torch.set_num_threads(1)
    for batch in options.batches:
        gate(Config(GATED, batch, options.blocks, rank=rank, world=world, device=device), options.arms)
    if rank == 0:
        print(f"{header()}\nLink: {link_name(options)}; {world} processes.\n\n{RIVALS_HEAD}", flush=True)
    for width in options.widths:
        for batch in options.batches:
            compare(Config(width, batch, options.blocks, rank=rank, world=world, device=device), options)
    dist.barrier()
    processes.leave()


GATED = 64
"""The width at which ways are checked: the same code on messages of less time."""


def gate(config: Config, names: Sequence[str]) -> None:
    """SystemExit unless every way agrees with plain backpropagation; on short sequences, in float64."""
    exact = replace(config, dtype=torch.float64, context=16, plain=True)
    for name in names:
        arm = ARMS[name](exact)
        if isinstance(arm, Arm):
            wrong = processes.largest(arm.check(), config.device)
            if not wrong <= TOLERANCE:
                raise SystemExit(f"{name} differs from backpropagation by {wrong:.1e} of the largest value: no table")


def compare(config: Config, options: argparse.Namespace) -> None:
    """Times every way in turn, and notes each timing."""
    predicted = predictions(config, options) if config.rank == 0 else {}
    built = {name: ARMS[name](config) for name in options.arms}
    fixed = {"width": config.width, "batch": config.batch, "blocks": config.blocks, "link": link_name(options)}
    lines: list[dict] = []

    def note(line: dict, last: bool) -> None:
        if config.rank == 0:
            lines.append(line)
            if options.out:
                ledger.append(options.out, line)
            if last:
                print(rivals_row([other for other in lines if other["arm"] == line["arm"]], base(lines)), flush=True)

    for number in range(options.rounds + 1):
        steps = options.steps if number else min(2, options.steps)  # the first round warms up
        for name, arm in built.items():
            line = {"arm": name, **fixed, **predicted.get(name, {"simulated": None, "counted": None})}
            if isinstance(arm, str):
                if number == options.rounds:
                    note(line | {"refused": arm}, last=True)
                continue
            seconds, carried = timed(lambda arm=arm, steps=steps: arm.run(steps), steps, config)
            if arm.rare:
                more, rare = timed(arm.rare, arm.every, config)
                seconds, carried = seconds + more, None if carried is None or rare is None else carried + rare
            if number:
                note(line | {"sizes": arm.sizes, "seconds": seconds, "bytes": carried}, number == options.rounds)


def link_name(options: argparse.Namespace) -> str:
    return f"{options.mbit:g} Mbit, {options.delay_ms:g} ms" if options.mbit else "loopback"


def asking(priced: Priced) -> Priced:
    """As torch's pipelines run: a message is asked for when the operation that needs it is next."""
    return replace(priced, asked=True)


def cut(costs: Costs, world: int, name: str) -> tuple[int, ...]:
    """The stages that the arm has."""
    return local_sizes(len(costs.blocks), world, name)


Predict = Callable[[Costs, int, int, Network], Priced]
"""Of costs, batch, processes and the network between them."""

PREDICTED: dict[str, Predict] = {
    "bp": lambda costs, batch, world, network: by_backpropagation(costs, batch),
    "DDP": by_data,
    **{
        f"1F1B, m = {m}": lambda costs, batch, world, _, m=m: asking(by_pipeline(costs, batch, world, m))
        for m in (2, 4, 8)
    },
    **{
        f"ZBV, m = {m}": lambda costs, batch, world, _, m=m: asking(by_zero_bubble(costs, batch, world, m))
        for m in (2, 4, 8)
    },
    **{
        f"2BW, m = {m}": lambda costs, batch, world, _, m=m: by_late_pipeline(costs, batch, world, m) for m in (2, 4, 8)
    },
    "stream": lambda costs, batch, world, _: by_local_stages(costs, batch, world, sizes=cut(costs, world, "stream")),
    "stream, bf16 on the link": lambda costs, batch, world, _: by_local_stages(
        costs, batch, world, wire=0.5, sizes=cut(costs, world, "stream")
    ),
    "solo, R = 16": lambda costs, batch, world, _: by_local_stages(
        costs, batch, world, "solo", refresh=16, sizes=cut(costs, world, "solo")
    ),
    "greedy": lambda costs, batch, world, _: by_local_stages(
        costs, batch, world, "head", sizes=cut(costs, world, "greedy")
    ),
}
"""The arms that the cost model knows."""


def predictions(config: Config, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Simulated seconds and counted bytes of a step, of the arms that there can be."""
    network = config.network()
    x, y = config.data()
    costs = measured_costs(network, x, y, cross_entropy, lambda: [config.optimizer(network.parameters())])
    between = Network(options.mbit * 1e6 / 8 or float("inf"), options.delay_ms / 1e3)
    found = {}
    for name in options.arms:
        if name in PREDICTED:
            with contextlib.suppress(ValueError):  # which says what the arm says too
                priced = PREDICTED[name](costs, config.batch, config.world, between)
                crossing = priced.reduced[1] * config.world if priced.reduced else sum(size for _, size in sent(priced))
                found[name] = {"simulated": step_seconds(priced, between), "counted": crossing}
    return found


def timed(work: Callable[[], None], steps: int, config: Config) -> tuple[float, float | None]:
    """Seconds a step from a barrier to the end of the last process, and bytes a step of all processes."""
    dist.barrier()
    before, began = processes.sent_bytes(), time.perf_counter()
    work()
    if config.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = processes.largest(time.perf_counter() - began, config.device) / steps
    after = processes.sent_bytes()
    if before is None or after is None:
        return seconds, None
    sent = processes.total((after - before) / steps, config.device)
    return seconds, sent / config.world if shared_interface() else sent


def shared_interface() -> bool:
    """Whether all processes send through one interface, each counting the bytes of all."""
    return os.environ.get("GLOO_SOCKET_IFNAME") == "lo"


RIVALS_HEAD = """| width | batch | | seconds a step | samples a second, bp = 1 | MB a step | counted | simulated s | off |
|---|---|---|---|---|---|---|---|---|"""


def base(lines: Sequence[dict]) -> float | None:
    """Seconds a step of one process's backpropagation, if there are any."""
    found = [line["seconds"] for line in lines if line["arm"] == "bp"]
    return statistics.median(found) if found else None


def rivals_row(timings: Sequence[dict], alone: float | None) -> str:
    """One way's row in Markdown, of all its rounds."""
    first = timings[0]
    start = f"| {first['width']} | {first['batch']} | {first['arm']}"
    if "refused" in first:
        return f"{start} | {first['refused']} | | | | | |"
    seconds, carried = statistics.median(timing["seconds"] for timing in timings), first["bytes"]
    stages = f" ({', '.join(map(str, first['sizes']))})" if first["sizes"] else ""
    ratio = f"{alone / seconds:.2f}" if alone else ""
    crossed, counted = ("" if size is None else f"{size / 1e6:.2f}" for size in (carried, first["counted"]))
    expected = first["simulated"]
    model = f"{expected:.4f} | {100 * (expected / seconds - 1):+.0f} %" if expected else " | "
    return f"{start}{stages} | {seconds:.4f} | {ratio} | {crossed} | {counted} | {model} |"


def table(options: argparse.Namespace) -> None:
    """Prints the tables of a file's timings, one for each link."""
    for (link,), lines in groups(ledger.read(options.file), "link").items():
        print(f"Link: {link}.\n\n{RIVALS_HEAD}")
        for setting in groups(lines, "blocks", "width", "batch").values():
            for timings in groups(setting, "arm").values():
                print(rivals_row(timings, base(setting)))
        print()


Scheme = Callable[[int, int, int | None], Priced]
"""Of blocks, devices, and the steps after which copies are refreshed."""

EMULATED: dict[str, Scheme] = {
    "bp": lambda blocks, devices, _: by_pipeline(equal(blocks), 1, devices, 1),
    **{
        name: lambda blocks, devices, refresh, kind=kind: by_local_stages(
            equal(blocks), 1, devices, kind, refresh=refresh
        )
        for kind, name in SCHEMES.items()
    },
    "1F1B": lambda blocks, devices, _: by_pipeline(equal(blocks), 2 * devices, devices, 2 * devices),
    "ZBV": lambda blocks, devices, _: by_zero_bubble(equal(blocks), 2 * devices, devices, 2 * devices),
    "2BW": lambda blocks, devices, _: by_late_pipeline(equal(blocks), 2 * devices, devices, 2 * devices),
    "paper": lambda blocks, devices, _: by_tree(equal(blocks), 1, devices, posterior=True),
    "tree": lambda blocks, devices, _: by_tree(equal(blocks), 1, devices, posterior=False),
}
"""On a batch that counts as one sample, or as one for each micro-batch."""

BY_WORKERS = tuple(SCHEMES.values())
"""Those that are emulated by ``hbll.distributed.Worker`` with blocks that sleep; of the others the schedule's operations."""


def emulate(options: argparse.Namespace) -> None:
    """Emulated beside simulated seconds, for one number of stages."""
    rank, world, _ = processes.join()
    torch.set_num_threads(1)
    rows = []
    for name in options.schemes:
        priced = EMULATED[name](options.blocks * world, world, options.refresh)
        steps, micros = priced.schedule.steps, priced.micros

        def seconds(op: Op, priced: Priced = priced) -> float:
            return options.block_seconds / priced.micros * priced.seconds(op)

        dist.barrier()
        if name in BY_WORKERS:
            # The pipeline must be full, with its first stage at work, to the end of the steps that count.
            more, each = steps + world, options.block_seconds
            times = sleeping.train(name, priced.sizes, each, options.state_bytes, more, options.refresh)
            times = {op: span for op, span in times.items() if op.step < steps}
        else:
            times = by_schedule(priced, rank, seconds, options.state_bytes // micros)
        found = period(processes.gathered(times, world), steps)
        row = {"scheme": name, "stages": world, "blocks": options.blocks * world, "micros": micros, "emulated": found}
        rows.append(row | {"simulated": period(simulate(priced.schedule, seconds), steps)})
    held = processes.total(processes.memory(), torch.device("cpu"))
    if rank == 0:
        for row in rows:
            off = row["emulated"] / row["simulated"] - 1
            figures = f"{row['emulated']:.4f} | {row['simulated']:.4f} | {100 * off:+.1f} %"
            print(f"| {row['scheme']} | {world} | {row['blocks']} | {row['micros']} | {figures} | {held / 2**30:.2f} |")
            if options.out:
                ledger.append(options.out, row | {"memory": held, "block_seconds": options.block_seconds})
    dist.barrier()
    processes.leave()


def by_schedule(priced: Priced, rank: int, seconds: Callable[[Op], float], state_bytes: int) -> dict[Op, Span]:
    """Runs the operations of this process, each of which sleeps."""
    result = torch.zeros(state_bytes, dtype=torch.uint8)

    def perform(op: Op, _: object) -> Tensor:
        time.sleep(seconds(op))
        return result

    return processes.execute(priced.schedule, rank, perform, lambda op: torch.empty_like(result))


def start_emulation(options: argparse.Namespace) -> int:
    """An emulation in as many processes as there are stages, for each number of them."""
    print(f"{header()}\nEmulated: {options.block_seconds} s a block and batch are slept.\n")
    print("| scheme | stages | blocks | micro-batches | emulated s a step | simulated | off | GiB of all processes |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    return next((code for count in options.stages if (code := processes.launch(count))), 0)


def accounting(options: argparse.Namespace) -> None:
    """What a step takes on equal stages without communication, in units of one device's."""
    print("| | " + " | ".join(f"p = {p}: m = {', '.join(map(str, m))}" for p, m in COLUMNS.items()) + " |")
    print("|---|" + "---|" * len(COLUMNS))
    for name, cells in account().items():
        print(f"| {name} | " + " | ".join(cells) + " |")


COLUMNS = {2: (1, 2, 4, 8), 4: (4, 8, 16)}
"""The numbers of micro-batches for each number of devices."""

CHAINS = (7, 15, 31, 63)
"""Blocks of chains that stream and greedy cut into stages that are not quite equal."""


def account() -> dict[str, list[str]]:
    """The rows of the table."""
    return {
        "data parallel": [f"{share(by_data(equal(8), 8, p, Network())):.2f}" for p in COLUMNS],
        "GPipe, 1F1B": [split(by_pipeline, p) for p in COLUMNS],
        "ZBV, a step by itself": [split(by_zero_bubble, p, alone=True) for p in COLUMNS],
        "ZBV, steps that overlap": [split(by_zero_bubble, p) for p in COLUMNS],
        "2BW": [split(by_late_pipeline, p) for p in COLUMNS],
        **{
            f"{name}, {blocks} blocks": [f"{share(by_local_stages(equal(blocks), 1, p, kind)):.2f}" for p in COLUMNS]
            for name, kind in (("stream", "spine"), ("stream, one jump", "last"), ("greedy", "head"), ("solo", "solo"))
            for blocks in CHAINS
        },
    }


def split(build: Callable[..., Priced], devices: int, alone: bool = False) -> str:
    """A cell of a scheme with micro-batches, a figure for each number of them; a dash where there can be none."""
    figures = []
    for micros in COLUMNS[devices]:
        try:
            figures.append(f"{share(build(equal(8), micros, devices, micros), alone):.2f}")
        except ValueError:
            figures.append("-")
    return ", ".join(figures)


def share(priced: Priced, alone: bool = False) -> float:
    """Of one device's seconds with the same batch."""
    blocks, batch = sum(priced.sizes), 8 if priced.scheme == "DDP" else priced.micros
    found: Estimate = estimate(priced, Network())
    return (found.alone if alone else found.seconds) / estimate(
        by_backpropagation(equal(blocks), batch), Network()
    ).seconds


def header() -> str:
    """What this was measured on, and how."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    machine = gpu or f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    what = f"{machine}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}, commit {ledger.commit() or '?'}"
    return f"{what}\n`python {shlex.join(sys.argv)}`"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    timing = commands.add_parser("rivals")
    timing.add_argument("--widths", type=int, nargs="+", default=[128, 256])
    timing.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    timing.add_argument("--blocks", type=int, default=7)
    timing.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    timing.add_argument("--steps", type=int, default=10, help="of a round, in which pipelines fill once")
    timing.add_argument("--rounds", type=int, default=3)
    timing.add_argument("--processes", type=int, default=2)
    timing.add_argument(
        "--mbit", type=float, default=0, help="of the link, for the simulation and the table; 0: loopback"
    )
    timing.add_argument("--delay-ms", type=float, default=0, help="of the link, one way")
    timing.add_argument("--out", type=Path, help="file for the timings, a JSON object a line")
    tables = commands.add_parser("table")
    tables.add_argument("file", type=Path, help="timings of `rivals`")
    emulation = commands.add_parser("emulate")
    emulation.add_argument(
        "--block-seconds", type=float, default=0.02, help="of a block's forward evaluation of a batch"
    )
    emulation.add_argument("--stages", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    emulation.add_argument("--blocks", type=int, default=2, help="of every stage")
    emulation.add_argument("--state-bytes", type=int, default=2**17, help="of a message")
    emulation.add_argument("--refresh", type=int, help="steps after which copies are refreshed; never unless given")
    emulation.add_argument("--schemes", nargs="+", choices=list(EMULATED), default=list(EMULATED))
    emulation.add_argument("--out", type=Path, help="file for the rows, a JSON object a line")
    commands.add_parser("accounting")
    options = parser.parse_args()
    if options.command in ("accounting", "table"):
        (accounting if options.command == "accounting" else table)(options)
        return 0
    if not processes.launched():
        return start_emulation(options) if options.command == "emulate" else processes.launch(options.processes)
    (emulate if options.command == "emulate" else rivals)(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
