"""Seconds per training step of a GRU against the length of the sequence: both local rules beside three exact baselines.

    python benchmarks/rnn_speed.py --out OUT --minutes 8                    # GPU: bf16, with CUDA graphs
    python benchmarks/rnn_speed.py --out OUT --widths 128 --minutes 8       # CPU: float32, one thread
    python benchmarks/rnn_speed.py --out OUT --predict                      # measures nothing: the cost model's curves

paper    tree over time and 4 consistency sweeps            bptt   backpropagation, one unfused cell call per time step
scan     chunks and a coarse step, ScanRule.suggested       gru    backpropagation through nn.GRU (cuDNN's on a GPU)
                                                            deer   parallel Newton, exact gradients
A step is the rule, its backward pass and fresh gradients, without the optimizer. Sequences are MNIST's shape: 2^D chunks of
ceil(784 / 2^D) pixels. On a GPU every method is timed as PyTorch runs it (eager) and replayed as one CUDA graph; DEER's
graph holds as many iterations as it needed before. With --compile the cell's unit-wise functions go through torch.compile,
for every method that calls the cell. The best round of several counts; on a CPU processor time does, so that what else
runs there does not. Peak memory is what a step holds beyond weights and input. Results are written after every row; rows
come in an order that makes an interrupted table useful.

The cost model is ``hbll.recurrent.cost``: a latency for every evaluation of the span, and all operations at one throughput.
Its constants are assumptions, given as options. It says what a machine with these constants would do; it is no measurement.
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch
from gate import gate
from torch import nn

from hbll.recurrent import GRU, Backpropagation, DepthCells, Newton, PaperRule, RecurrentNetwork, ScanRule, make_rule
from hbll.recurrent.cost import Machine, backpropagation_cost, paper_cost, scan_cost
from hbll.rule import Step

METHODS = ["bptt", "gru", "deer", "paper", "scan"]
MODES = {"graph": "-", "eager": ":", "predicted": "--"}
"""How a row's seconds came about, and the line that shows them."""


class Subject:
    """One method at one length and width: a step to time, and what it counts."""

    def __init__(self, method: str, depth: int, width: int, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        length, self.method = 2**depth, method
        inputs = -(-784 // length)
        # One cell per depth; the deepest reads half of the sequence.
        network = RecurrentNetwork(DepthCells(GRU, inputs, width, depth), nn.Linear(width, 10), length=length)
        self.network = network.to(options.device, options.dtype)
        self.x = torch.rand(options.batch, length, inputs).to(options.device, options.dtype)
        self.y = torch.randint(10, (options.batch,)).to(options.device)
        if options.compile:
            cell = self.network.cell
            cell.combine = torch.compile(cell.combine, dynamic=True)
            cell.slopes = torch.compile(cell.slopes, dynamic=True)
        if method == "gru":
            self.gru = self.network.export_sequence().to(options.device)
        elif method == "deer":
            self.rule = Newton(self.network, tolerance=1e-3 if options.dtype == torch.float32 else 2e-2)
        elif method == "paper":
            self.rule = PaperRule(self.network)
        elif method == "scan":
            self.rule = make_rule("hbll", self.network, **options.scan).to(options.device)
        else:
            self.rule = Backpropagation(self.network)
        self.taken: Step | None = None

    def clear(self) -> None:
        """Drops all gradients, and what the last step returned."""
        self.taken = None
        for module in (self.network, self.gru if self.method == "gru" else self.rule):
            module.zero_grad()

    def step(self) -> None:
        """Fresh gradients of one batch."""
        self.clear()
        if self.method == "gru":
            hidden, _ = self.gru(self.x)
            nn.functional.cross_entropy(self.network.head(hidden[:, -1]), self.y).backward()
            return
        self.taken = self.rule.backward(self.x, self.y)

    @property
    def iterations(self) -> int:
        """Of Newton in the last step; its work is that of ``newton_cost``."""
        assert self.taken is not None
        return self.taken.work // self.x.shape[1] - 2

    def counted(self) -> tuple[int, int, int | None]:
        """Work, span and sweeps or iterations; the fused baseline's work and span are backpropagation's."""
        if self.taken is None:
            return 3 * self.x.shape[1], 2 * self.x.shape[1], None
        sweeps = self.iterations if self.method == "deer" else getattr(self.rule, "sweeps", None)
        return self.taken.work, self.taken.span, sweeps


def graphed(step: Callable[[], None]) -> Callable[[], None]:
    """The step as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def seconds(step: Callable[[], None], cuda: bool, limit: float) -> float:
    """The best round's mean time, within about ``limit`` seconds."""
    clock, synchronize = (time.perf_counter, torch.cuda.synchronize) if cuda else (time.process_time, lambda: None)
    step()
    synchronize()
    began = clock()
    step()
    synchronize()
    once = clock() - began
    repeats = max(1, int(limit / 4 / once))
    best = once
    for _ in range(3 if once < limit else 0):
        began = clock()
        for _ in range(repeats):
            step()
        synchronize()
        best = min(best, (clock() - began) / repeats)
    return best


def peak_on_cuda(step: Callable[[], None]) -> int:
    """Bytes that a step holds at most."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_on_cpu(step: Callable[[], None]) -> int:
    """Bytes that a step holds at most: the highest sum of the allocator's events."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def measure(method: str, depth: int, width: int, options: argparse.Namespace) -> dict:
    """A row of the table; ``error`` in it where the method cannot run."""
    row = {"method": method, "depth": depth, "width": width, "dtype": str(options.dtype).removeprefix("torch.")}
    cuda = options.device == "cuda"
    needed = 2**depth * options.batch * width**2 * (2 if options.dtype == torch.bfloat16 else 4) * 5
    if method == "deer" and needed > options.deer_gib * 2**30:
        return row | {"error": f"needs {needed / 2**30:.0f} GiB for a Jacobian of every step and sample"}
    try:
        subject = Subject(method, depth, width, options)
        subject.step()
        subject.clear()
        row["memory"] = (peak_on_cuda if cuda else peak_on_cpu)(subject.step)
        row["eager"] = seconds(subject.step, cuda, options.limit)
        row["work"], row["span"], row["sweeps"] = subject.counted()
        if cuda:
            if method == "deer":
                subject.rule = Newton(subject.network, iterations=subject.iterations)
            row["graph"] = seconds(graphed(subject.step), cuda, options.limit)
    except torch.OutOfMemoryError:
        row["error"] = "out of memory"
    except RuntimeError as error:  # a capture that fails must not cost the rows that follow
        row["error"] = str(error).splitlines()[0]
    return row


def predicted(method: str, depth: int, width: int, options: argparse.Namespace) -> dict:
    """A row of what the cost model says."""
    length, machine = 2**depth, Machine(options.latency, options.throughput)
    if method == "scan":
        chosen = {**ScanRule.suggested(length), **options.scan}
        tree = chosen.pop("guess") == "tree"
        cost = scan_cost(length, **chosen, tree=tree)
    else:
        cost = paper_cost(length, sweeps=4) if method == "paper" else backpropagation_cost(length)
    if method == "gru":
        machine = Machine(options.fused_latency, options.throughput)
    time = machine.seconds(cost, options.batch, width, GRU.gates)
    return {"method": method, "depth": depth, "width": width, "predicted": time, "work": cost.work, "span": cost.span}


def best(row: dict) -> float:
    return min(row.get(mode, math.inf) for mode in MODES)


def table(rows: list[dict]) -> str:
    """Markdown: milliseconds, and how many times faster than unfused BPTT (eager, as in the paper) and than nn.GRU."""
    found = {(row["width"], row["depth"], row["method"]): row for row in rows}
    modes = [mode for mode in MODES if any(mode in row for row in rows)]
    columns = ["width", "N", "method", *(f"{mode} ms" for mode in modes), "x bptt eager", "x bptt", "x gru"]
    columns += ["span", "work", "sweeps", "peak MiB", ""]
    text = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for (width, depth, method), row in sorted(found.items(), key=lambda item: item[0][:2]):
        bptt, gru = found.get((width, depth, "bptt"), {}), found.get((width, depth, "gru"), {})
        rivals = bptt.get("eager", math.inf), best(bptt), best(gru)
        cells = [width, 2**depth, method, *(f"{1000 * row[mode]:.2f}" if mode in row else "-" for mode in modes)]
        cells += [f"{rival / best(row):.2f}" if rival < math.inf > best(row) else "-" for rival in rivals]
        cells += [row.get(key) or "-" for key in ("span", "work", "sweeps")]
        cells += [f"{row['memory'] / 2**20:.0f}" if "memory" in row else "-", row.get("error", "")]
        text.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(text) + "\n"


def crossings(rows: list[dict]) -> str:
    """A sentence per width: from which of the lengths on the scan is faster."""
    found = {(row["width"], row["depth"], row["method"]): row["predicted"] for row in rows}
    lines = []
    for width in sorted({row["width"] for row in rows}):
        depths = sorted({row["depth"] for row in rows})
        for rival in ("bptt", "gru"):
            slower = [d for d in depths if found[width, d, "scan"] >= found[width, d, rival]]
            after = [d for d in depths if d > max(slower, default=-1)]
            lines.append(
                f"Width {width}: faster than {rival} " + (f"from N = {2 ** after[0]} on." if after else "nowhere.")
            )
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], file: Path) -> None:
    """Seconds, and speed over unfused BPTT (eager, or both predicted), against length; a column of panels per width."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    columns = sorted({("predicted" in row, row["width"]) for row in rows})
    figure, axes = plt.subplots(2, len(columns), figsize=(3.6 * len(columns), 6), squeeze=False, layout="constrained")
    for (prediction, width), (above, below) in zip(columns, axes.T, strict=True):
        here = [row for row in rows if ("predicted" in row, row["width"]) == (prediction, width)]
        against = "predicted" if prediction else "eager"
        base = {row["depth"]: row[against] for row in here if row["method"] == "bptt" and against in row}
        for number, method in enumerate(METHODS):
            for mode, style in MODES.items():
                points = sorted((r["depth"], r[mode]) for r in here if r["method"] == method and mode in r)
                line = {"color": f"C{number}", "linestyle": style, "marker": "o", "ms": 3}
                if points:
                    above.plot(
                        [2**d for d, _ in points], [1000 * t for _, t in points], label=f"{method}, {mode}", **line
                    )
                    shown = [(2**d, base[d] / t) for d, t in points if d in base]
                    below.plot([n for n, _ in shown], [ratio for _, ratio in shown], **line)
        title = f"width {width}, " + ("a prediction" if prediction else "measured")
        above.set(title=title, ylabel="ms per training step", yscale="log")
        above.set_xscale("log", base=2)
        above.legend(fontsize=6)
        if not base:
            below.remove()
            continue
        below.set(xlabel="N, time steps", ylabel="speed over unfused BPTT", yscale="log")
        below.set_xscale("log", base=2)
        below.axhline(1, color="grey", lw=0.8)
    figure.savefig(file, dpi=60)
    plt.close(figure)


def order(depths: list[int], widths: list[int]) -> list[tuple[int, int]]:
    """(depth, width): the extremes first, so that an early end leaves a curve through few points and not half a curve."""
    ranked = sorted(depths, key=lambda depth: (depth not in (8, 10), depth not in (4, 6), depth % 2, depth))
    return [(depth, width) for depth in ranked for width in widths]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/rnn_speed"))
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--widths", nargs="+", type=int, default=[2048, 128, 512])
    parser.add_argument("--depths", nargs="+", type=int, default=list(range(1, 11)))
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--limit", type=float, default=0.4, help="seconds to spend on timing one variant")
    parser.add_argument("--deer-gib", type=float, default=60 if torch.cuda.is_available() else 1)
    parser.add_argument(
        "--scan", type=json.loads, default={}, help="options of ScanRule instead of the suggested, as JSON"
    )
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--predict", action="store_true", help="the cost model instead of a measurement")
    parser.add_argument("--latency", type=float, default=20e-6, help="seconds of a dependent evaluation, unfused")
    parser.add_argument("--fused-latency", type=float, default=6e-6, help="the same inside of a fused nn.GRU")
    parser.add_argument("--throughput", type=float, default=3e14, help="floating-point operations a second")
    parser.add_argument(
        "--join", nargs="+", type=Path, help="only tabulate and plot the rows of these rows.json together"
    )
    options = parser.parse_args()
    if not (options.join or options.predict):
        gate(["recurrent"])
    options.out.mkdir(parents=True, exist_ok=True)
    header, rows = (join if options.join else predict if options.predict else measure_all)(options)
    forecast = [row for row in rows if "predicted" in row]
    made = [row for row in rows if "predicted" not in row]
    text = "\n".join([header + "\n", *(table(each) for each in (made, forecast) if each), crossings(forecast)])
    (options.out / "rows.json").write_text(json.dumps({"machine": header, "rows": rows}, indent=1) + "\n")
    (options.out / "table.md").write_text(text)
    plot(rows, options.out / "speed.png")
    print(text)


def join(options: argparse.Namespace) -> tuple[str, list[dict]]:
    """Earlier results: the machines, and all rows."""
    runs = [json.loads(file.read_text()) for file in options.join]
    return "; ".join(dict.fromkeys(run["machine"] for run in runs)), [row for run in runs for row in run["rows"]]


def predict(options: argparse.Namespace) -> tuple[str, list[dict]]:
    """What was assumed, and all rows."""
    header = (
        f"A prediction for a machine of {1e6 * options.latency:g} µs a dependent evaluation, "
        f"{1e6 * options.fused_latency:g} µs in a fused GRU, {options.throughput / 1e12:g} TFLOP/s; batch {options.batch}"
    )
    methods = [method for method in options.methods if method != "deer"]  # its products are of every sample's own
    places = [(width, depth) for width in sorted(options.widths) for depth in sorted(options.depths)]
    return header, [predicted(method, depth, width, options) for width, depth in places for method in methods]


def measure_all(options: argparse.Namespace) -> tuple[str, list[dict]]:
    """The machine, and the rows that the time was enough for."""
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    options.dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    torch.set_num_threads(1)
    machine = torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()} CPU, one thread"
    header = (
        f"{machine}, torch {torch.__version__}, {options.dtype}, batch {options.batch}, {time.strftime('%Y-%m-%d')}"
    )
    rows: list[dict] = []
    deadline = time.monotonic() + 60 * options.minutes
    try:
        for depth, width in order(options.depths, options.widths):
            for method in options.methods:
                if time.monotonic() > deadline:
                    raise TimeoutError
                rows.append(measure(method, depth, width, options))
                if options.device == "cuda":
                    torch.cuda.empty_cache()
                print(json.dumps(rows[-1]), flush=True)
                (options.out / "rows.json").write_text(json.dumps({"machine": header, "rows": rows}, indent=1) + "\n")
    except (KeyboardInterrupt, TimeoutError):
        print("stopped; the table has what is done")
    return header, rows


if __name__ == "__main__":
    main()
