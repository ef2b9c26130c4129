"""Seconds per training step of a GRU against the length of the sequence: both local rules beside three exact baselines.

    python benchmarks/rnn_speed.py --out benchmarks/results/rnn_speed --minutes 8       # GPU: bf16, with CUDA graphs
    python benchmarks/rnn_speed.py --widths 64 --depths 1 2 3 4 5 6 --minutes 3         # CPU: float32

paper    tree over time and 4 consistency sweeps            bptt   backpropagation, one unfused cell call per time step
scan     chunks and a coarse step, ScanRule.suggested       gru    backpropagation through nn.GRU (cuDNN's on a GPU)
                                                            deer   parallel Newton, exact gradients
A step is the rule, its backward pass and fresh gradients, without the optimizer. Sequences are MNIST's shape: 2^D chunks of
ceil(784 / 2^D) pixels. On a GPU every method is timed as PyTorch runs it (eager) and replayed as one CUDA graph; DEER's
graph holds as many iterations as it needed before. With --compile the cell's unit-wise functions go through torch.compile,
for every method that calls the cell. The best round of several counts. Peak memory is what a step holds beyond weights and
input. Results are written after every row; rows come in an order that makes an interrupted table useful.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from hbll.recurrent import GRU, Backpropagation, DepthCells, Newton, PaperRule, RecurrentNetwork, ScanRule
from hbll.recurrent.step import RecurrentStep

METHODS = ["bptt", "gru", "deer", "paper", "scan"]


class Subject:
    """One method at one length and width: a step to time, and what it counts."""

    def __init__(self, method: str, depth: int, width: int, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        length, self.method = 2**depth, method
        inputs = -(-784 // length)
        # One cell per depth; the deepest reads half of the sequence.
        network = RecurrentNetwork(DepthCells(GRU, inputs, width, depth), nn.Linear(width, 10))
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
            self.rule = Newton(tolerance=1e-3 if options.dtype == torch.float32 else 2e-2)
        elif method == "paper":
            self.rule = PaperRule()
        elif method == "scan":
            self.rule = ScanRule(self.network, length, **(ScanRule.suggested(length) | options.scan)).to(options.device)
        else:
            self.rule = Backpropagation()
        self.taken: RecurrentStep | None = None

    def step(self) -> None:
        """Fresh gradients of one batch."""
        modules = [self.network, self.gru if self.method == "gru" else self.rule]
        for module in modules:
            for parameter in module.parameters():
                parameter.grad = None
        if self.method == "gru":
            hidden, _ = self.gru(self.x)
            nn.functional.cross_entropy(self.network.head(hidden[:, -1]), self.y).backward()
            return
        self.taken = self.rule(self.network, self.x, self.y)
        self.taken.loss.backward()

    def counted(self) -> tuple[int | None, int | None, int | None]:
        """Work, span and sweeps; the fused baseline's work and span are backpropagation's."""
        if self.taken is None:
            return 3 * self.x.shape[1], 2 * self.x.shape[1], None
        return self.taken.work, self.taken.span, self.taken.sweeps or None


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


def seconds(step: Callable[[], None], synchronize: Callable[[], None], limit: float) -> float:
    """The best round's mean time, within about ``limit`` seconds."""
    step()
    synchronize()
    began = time.perf_counter()
    step()
    synchronize()
    once = time.perf_counter() - began
    repeats = max(1, int(limit / 4 / once))
    best = once
    for _ in range(3 if once < limit else 0):
        began = time.perf_counter()
        for _ in range(repeats):
            step()
        synchronize()
        best = min(best, (time.perf_counter() - began) / repeats)
    return best


def measure(method: str, depth: int, width: int, options: argparse.Namespace) -> dict:
    """A row of the table; ``error`` in it where the method cannot run."""
    row = {"method": method, "depth": depth, "width": width, "dtype": str(options.dtype).removeprefix("torch.")}
    cuda = options.device == "cuda"
    synchronize = torch.cuda.synchronize if cuda else lambda: None
    needed = 2**depth * options.batch * width**2 * (2 if options.dtype == torch.bfloat16 else 4) * 5
    if method == "deer" and needed > options.deer_gib * 2**30:
        return row | {"error": f"needs {needed / 2**30:.0f} GiB for a Jacobian of every step and sample"}
    try:
        subject = Subject(method, depth, width, options)
        subject.step()
        if cuda:
            synchronize()
            for module in (subject.network, getattr(subject, "rule", subject.network)):
                module.zero_grad()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            subject.step()
            synchronize()
            row["memory"] = torch.cuda.max_memory_allocated() - before
        row["eager"] = seconds(subject.step, synchronize, options.limit)
        row["work"], row["span"], row["sweeps"] = subject.counted()
        if cuda:
            if method == "deer":
                assert subject.taken is not None
                subject.rule = Newton(iterations=subject.taken.sweeps)
            row["graph"] = seconds(graphed(subject.step), synchronize, options.limit)
    except torch.OutOfMemoryError:
        row["error"] = "out of memory"
    except RuntimeError as error:  # a capture that fails must not cost the rows that follow
        row["error"] = str(error).splitlines()[0]
    return row


def best(row: dict) -> float:
    return min(row.get("eager", math.inf), row.get("graph", math.inf))


def table(rows: list[dict]) -> str:
    """Markdown: milliseconds, and how many times faster than unfused BPTT (eager, as in the paper) and than nn.GRU."""
    found = {(row["width"], row["depth"], row["method"]): row for row in rows}
    text = [
        "| width | N | method | eager ms | graph ms | x bptt eager | x bptt | x gru | span | work | sweeps | peak MiB | |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (width, depth, method), row in sorted(found.items(), key=lambda item: (item[0][0], item[0][1])):
        bptt, gru = found.get((width, depth, "bptt"), {}), found.get((width, depth, "gru"), {})

        def milliseconds(mode: str, row: dict = row) -> str:
            return f"{1000 * row[mode]:.2f}" if mode in row else "-"

        def ratio(value: float, row: dict = row) -> str:
            return f"{value / best(row):.2f}" if math.isfinite(value) and math.isfinite(best(row)) else "-"

        memory = f"{row['memory'] / 2**20:.0f}" if "memory" in row else "-"
        text.append(
            f"| {width} | {2**depth} | {method} | {milliseconds('eager')} | {milliseconds('graph')} | "
            f"{ratio(bptt.get('eager', math.inf))} | {ratio(best(bptt))} | {ratio(best(gru))} | {row.get('span') or '-'} | "
            f"{row.get('work') or '-'} | {row.get('sweeps') or '-'} | {memory} | {row.get('error', '')} |"
        )
    return "\n".join(text) + "\n"


def plot(rows: list[dict], file: Path) -> None:
    """Speed over unfused BPTT against length, a panel per width."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    widths = sorted({row["width"] for row in rows})
    figure, axes = plt.subplots(2, len(widths), figsize=(5 * len(widths), 7), squeeze=False, layout="constrained")
    for width, (above, below) in zip(widths, axes.T, strict=True):
        base = {
            row["depth"]: row["eager"]
            for row in rows
            if row["width"] == width and row["method"] == "bptt" and "eager" in row
        }
        for method in METHODS:
            mine = sorted((r for r in rows if r["width"] == width and r["method"] == method), key=lambda r: r["depth"])
            for mode, style in (("graph", "-"), ("eager", ":")):
                points = [(2 ** r["depth"], r[mode], base.get(r["depth"])) for r in mine if mode in r]
                if points:
                    colour, label = f"C{METHODS.index(method)}", f"{method}, {mode}"
                    above.plot(
                        [p[0] for p in points],
                        [1000 * p[1] for p in points],
                        style,
                        marker="o",
                        ms=3,
                        color=colour,
                        label=label,
                    )
                    shown = [p for p in points if p[2]]
                    below.plot(
                        [p[0] for p in shown], [p[2] / p[1] for p in shown], style, marker="o", ms=3, color=colour
                    )
        above.set(title=f"GRU, width {width}", ylabel="ms per training step", xscale="log", yscale="log")
        below.set(xlabel="N, time steps", ylabel="times faster than unfused BPTT, eager", xscale="log", yscale="log")
        below.axhline(1, color="grey", lw=0.8)
        for panel in (above, below):
            panel.set_xscale("log", base=2)
    axes[0, 0].legend(fontsize=7)
    figure.savefig(file, dpi=120)
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
    options = parser.parse_args()
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    options.dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    options.out.mkdir(parents=True, exist_ok=True)
    machine = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
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
    text = f"{header}\n\n{table(rows)}"
    (options.out / "table.md").write_text(text)
    plot(rows, options.out / "speed.png")
    print(text)


if __name__ == "__main__":
    main()
