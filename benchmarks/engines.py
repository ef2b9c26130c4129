"""Seconds per training step: the batched engine beside the loop, and both beside backpropagation on the same chain.

    python benchmarks/engines.py                      # CPU: 15 and 31 blocks, batch 64, widths 32, 128, 512
    python benchmarks/engines.py --blocks 7 15 31 63 127 --widths 128 512 --batches 64 256 --graphs --compile    # GPU

`graph` is the same step captured as a CUDA graph: what is left when launches cost nothing. `compiled` is torch.compile of
the whole forward pass. All variants of a row are timed in turn, several rounds, after a warm-up; the best round of each
counts, so that a busy machine hurts none of them more than another. A step is rule.backward (or forward pass, loss and
backward) and zero_grad; the optimizer's step is the same for all and left out. Ends with the table of counted work and span
for N = 4..256, beside the formulas.
"""

import argparse
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path

import ledger
import torch
import torch.nn.functional as F
from gate import gate
from torch import nn

import hbll
from hbll.models.convnet import ConvBlock, ConvHead
from hbll.models.gpt import GPTBlock
from hbll.models.mlp import SkipBlock


def best_times(steps: dict[str, Callable[[], None]], rounds: int, seconds: float) -> dict[str, float]:
    """The best mean seconds of a round, for each step."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    repeats = {}
    for name, step in steps.items():
        step(), step()
        synchronize()
        began = time.perf_counter()
        step()
        synchronize()
        repeats[name] = max(1, int(seconds / (time.perf_counter() - began)))
    best = dict.fromkeys(steps, math.inf)
    for _ in range(rounds):
        for name, step in steps.items():
            synchronize()
            began = time.perf_counter()
            for _ in range(repeats[name]):
                step()
            synchronize()
            best[name] = min(best[name], (time.perf_counter() - began) / repeats[name])
    return best


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """The step as a CUDA graph, which is launched in one go."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def problem(kind: str, blocks: int, width: int, batch: int, device: str) -> tuple[hbll.Chain, torch.Tensor]:
    """A network of one kind of blocks and a random input for it; 10 classes."""
    if kind == "mlp":
        parts = nn.Linear(64, width), [SkipBlock(width) for _ in range(blocks)], nn.Linear(width, 10)
        x = torch.randn(batch, 64)
    elif kind == "conv":
        parts = nn.Conv2d(3, width, 4, 4), [ConvBlock(width) for _ in range(blocks)], ConvHead(width, 10)
        x = torch.randn(batch, 3, 32, 32)
    else:
        head = nn.Sequential(nn.Flatten(), nn.LazyLinear(10))
        parts = nn.Linear(16, width), [GPTBlock(width, max(1, width // 32)) for _ in range(blocks)], head
        x = torch.randn(batch, 16, 16)
    network = hbll.Chain(*parts).to(device)
    network(x.to(device))
    return network, x.to(device)


def compare(kind: str, blocks: int, width: int, batch: int, options: argparse.Namespace, device: str) -> dict:
    torch.manual_seed(0)
    network, x = problem(kind, blocks, width, batch, device)
    y = torch.randint(10, (batch,), device=device)
    parameters = list(network.parameters())
    work: dict[str, float] = {}

    def forget() -> None:
        for parameter in parameters:  # what zero_grad does, without its search for the parameters
            parameter.grad = None

    def by_rule(name: str, engine: str) -> Callable[[], None]:
        rule = hbll.make_rule(name, network, engine=engine)

        def step() -> None:
            work[name] = rule.backward(x, y).work / (3 * blocks)
            forget()

        return step

    def by_backpropagation(forward: nn.Module) -> Callable[[], None]:
        def step() -> None:
            F.cross_entropy(forward(x), y).backward()
            forget()

        return step

    steps = {f"{rule} {engine}": by_rule(rule, engine) for rule in options.rules for engine in ("loop", "batched")}
    steps["bp"] = by_backpropagation(network)
    if options.graphs:
        steps |= {f"{name} graph": captured(step) for name, step in steps.items() if "loop" not in name}
    if options.compile:
        torch._dynamo.reset()
        steps["bp compiled"] = by_backpropagation(torch.compile(network, mode="reduce-overhead"))
    auto = hbll.make_rule("paper", network).backward(x, y).engine
    row = {"kind": kind, "blocks": blocks, "width": width, "batch": batch, "auto": auto, "work": work}
    return row | {
        "milliseconds": {name: 1e3 * t for name, t in best_times(steps, options.rounds, options.seconds).items()}
    }


def engine_table(rows: list[dict], rules: list[str]) -> str:
    variants = list(rows[0]["milliseconds"])
    pairs = [(f"{rule} loop", f"{rule} batched") for rule in rules] + [(f"{rule} batched", "bp") for rule in rules]
    if "bp graph" in variants:
        pairs += [(f"{rule} batched graph", "bp graph") for rule in rules]
    ratios = [f"{one} / {other}" for one, other in pairs]
    head = ["blocks of", "blocks", "width", "batch", *(f"{v}, ms" for v in variants), *ratios, "work / BP's", "auto"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        ms = row["milliseconds"]
        cells = [row["kind"], *(str(row[what]) for what in ("blocks", "width", "batch"))]
        cells += [f"{ms[variant]:.2f}" for variant in variants]
        cells += [f"{ms[one] / ms[other]:.2f}" for one, other in pairs]
        cells += [f"{row['work'][rules[0]]:.2f}", row["auto"]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def counter_table() -> str:
    """Counted work and span of one step for N = 4..256, with the formulas of arXiv 2606.21497's cost model."""
    lines = [
        "| N | paper: span | 3D - 1 | tree: span | D + 3 | BP: span | 2(N - 1) | paper: work / BP's | tree: work / BP's |",
        "|---" * 9 + "|",
    ]
    for depth in range(2, 9):
        nodes = 2**depth
        network, x = problem("mlp", nodes - 1, 4, 2, "cpu")
        rules = {
            "paper": hbll.make_rule("paper", network, engine="batched"),
            "tree": hbll.make_rule("tree", network, engine="batched"),
            "bp": hbll.make_rule("bp", network),
        }
        steps = {name: rule.backward(x, torch.tensor([0, 1])) for name, rule in rules.items()}
        cells = [
            nodes,
            steps["paper"].span,
            3 * depth - 1,
            steps["tree"].span,
            depth + 3,
            steps["bp"].span,
            2 * (nodes - 1),
        ]
        ratios = [f"{steps[rule].work / steps['bp'].work:.2f}" for rule in ("paper", "tree")]
        lines.append("| " + " | ".join(map(str, cells + ratios)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=["mlp", "conv", "transformer"], default=["mlp"])
    parser.add_argument("--blocks", type=int, nargs="+", default=[15, 31])
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--batches", type=int, nargs="+", default=[64])
    parser.add_argument("--rules", nargs="+", default=["paper", "tree"])
    parser.add_argument("--compile", action="store_true", help="also time backpropagation under torch.compile")
    parser.add_argument("--graphs", action="store_true", help="also time the steps as CUDA graphs")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.2, help="of a round of one variant")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="folder for engines.jsonl")
    options = parser.parse_args()
    gate(["bp", *options.rules, "test_engine.py"])

    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.processor() or platform.machine()} CPU"
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32\n", flush=True)
    rows = []
    for kind in options.kinds:
        for blocks in options.blocks:
            for width in options.widths:
                for batch in options.batches:
                    rows.append(compare(kind, blocks, width, batch, options, device))
                    if options.out:
                        ledger.append(options.out / "engines.jsonl", rows[-1])
    print(engine_table(rows, options.rules))
    print()
    print(counter_table())


if __name__ == "__main__":
    main()
