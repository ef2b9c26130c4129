"""Seconds and memory of a whole training step on one device, beside fused and compiled backpropagation.

    python benchmarks/step.py [--width 768] [--blocks 12] [--batch 8] [--context 1024] [--arms ..] [--out FILE]

A GPT under bf16 autocast, gradients by ``rule.backward``, weights moved by fused AdamW. ``compiled`` compiles the network's
blocks for backpropagation and checkpointing, the stages for a rule, and the heads; ``graphs`` compiles whole backpropagation
with CUDA graphs. Every arm is first checked: its first loss is that of the same arm uncompiled, to 1 %. Arms are timed one
after the other, in --rounds rounds; the median round counts. Memory is the allocator's peak over a step, with weights,
gradients and the optimizer's state, which all arms have, in it. Needs torch and numpy alone.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import ledger
import torch
import torch.nn.functional as F
from gate import gate
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hbll
from hbll.models.gpt import GPTBlock, GPTEmbed, GPTHead

VOCABULARY = 8192

RULES = {
    "stream, 2 stages": ("stream", {"stages": 2, "spine": "last"}),
    "stream, 4 stages": ("stream", {"stages": 4, "spine": "last"}),
    "stream, 4 stages, doubling": ("stream", {"stages": 4}),
    "greedy, 4 stages": ("greedy", {"stages": 4}),
    "paper, 4 stages": ("paper", {"stages": 4}),
}


class Checkpointed(nn.Module):
    """A block that is evaluated again when it is walked back."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, state: Tensor) -> Tensor:
        return checkpoint(self.block, state, use_reentrant=False)


def network(options: argparse.Namespace) -> hbll.Chain:
    torch.manual_seed(0)
    width = options.width
    blocks = [GPTBlock(width, max(2, width // 64), depth=options.blocks) for _ in range(options.blocks)]
    made = hbll.Chain(GPTEmbed(VOCABULARY, options.context, width), blocks, GPTHead(VOCABULARY, width))
    return made.to(options.device)


def backpropagation(options: argparse.Namespace, how: str, compiled: bool) -> tuple[nn.Module, Callable[..., Tensor]]:
    net = network(options)
    if how == "checkpointed":
        net.blocks = nn.ModuleList(Checkpointed(block) for block in net.blocks)
    if compiled and how == "graphs":
        net.compile(mode="reduce-overhead")
    elif compiled:
        for part in (*net.blocks, net.head):
            part.compile()

    def walk(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(options.device, torch.bfloat16):
            loss = F.cross_entropy(net(x).flatten(0, 1), y.flatten())
        loss.backward()
        return loss.detach()

    return net, walk


def by_rule(options: argparse.Namespace, how: str, compiled: bool) -> tuple[nn.Module, Callable[..., Tensor]]:
    name, chosen = RULES[how]
    chosen = dict(chosen)
    net = network(options)
    stage = -(-options.blocks // chosen.pop("stages"))
    in_order = {} if name == "paper" else {"states": "chain"}
    rule = hbll.make_rule(name, net, stage=stage, **in_order, **chosen).to(options.device)
    if compiled:
        for part in (*rule.stages, *(block for stage in rule.stages for block in stage.blocks[-1:]), net.head):
            part.compile()

    def walk(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(options.device, torch.bfloat16):
            return rule.backward(x, y).loss

    return rule, walk


def arms() -> dict[str, Callable[[argparse.Namespace], tuple[nn.Module, Callable[..., Tensor]]]]:
    found = {}
    for compiled in (False, True):
        suffix = ", compiled" if compiled else ""
        found[f"bp{suffix}"] = lambda o, c=compiled: backpropagation(o, "plain", c)
        found[f"bp, checkpointed{suffix}"] = lambda o, c=compiled: backpropagation(o, "checkpointed", c)
        for rule in RULES:
            found[f"{rule}{suffix}"] = lambda o, c=compiled, r=rule: by_rule(o, r, c)
    found["bp, graphs"] = lambda o: backpropagation(o, "graphs", True)
    return found


def measure(name: str, options: argparse.Namespace) -> dict:
    """A row."""
    cuda = options.device == "cuda"
    torch.manual_seed(1)
    tokens = torch.randint(VOCABULARY, (options.batch, options.context + 1), device=options.device)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    model, walk = arms()[name](options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    began = time.perf_counter()
    first = walk(x, y).item()
    optimizer.zero_grad()

    def step() -> None:
        walk(x, y)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    started = time.perf_counter() - began
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    rounds = []
    for _ in range(options.rounds):
        began = time.perf_counter()
        for _ in range(options.steps):
            step()
        if cuda:
            torch.cuda.synchronize()
        rounds.append((time.perf_counter() - began) / options.steps)
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else None
    return {"arm": name, "seconds": statistics.median(rounds), "peak_mib": peak, "loss": first, "start": started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, value in (
        ("width", 768),
        ("blocks", 12),
        ("batch", 8),
        ("context", 1024),
        ("steps", 10),
        ("rounds", 3),
    ):
        parser.add_argument(f"--{option}", type=int, default=value)
    parser.add_argument("--arms", nargs="+", choices=list(arms()), default=list(arms()))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="file for the rows, a JSON object a line")
    options = parser.parse_args()
    gate(["bp", "stream", "paper"])
    what = {key: getattr(options, key) for key in ("width", "blocks", "batch", "context")}
    what |= {"device": torch.cuda.get_device_name() if options.device == "cuda" else platform.processor()}
    what |= {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "commit": ledger.commit()}
    print(json.dumps(what), flush=True)
    print("| | ms a step | bp = 1 | peak MiB | first step, s |\n|---|---|---|---|---|", flush=True)
    losses: dict[str, float] = {}
    base = None
    for name in options.arms:
        torch.compiler.reset()
        row = measure(name, options)
        losses[name] = row["loss"]
        plain = losses.get(name.removesuffix(", compiled").replace("bp, graphs", "bp"), row["loss"])
        if abs(row["loss"] - plain) > 0.01 * abs(plain):
            raise SystemExit(f"{name} has another loss than uncompiled, {row['loss']:.4f} for {plain:.4f}: no table")
        base = base or row["seconds"]
        peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}"
        figures = f"{1e3 * row['seconds']:.2f} | {row['seconds'] / base:.2f} | {peak} | {row['start']:.1f}"
        print(f"| {name} | {figures} |", flush=True)
        if options.out:
            ledger.append(options.out, what | row)
        if options.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
