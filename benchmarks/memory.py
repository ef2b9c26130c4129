"""Peak memory and seconds of a training step, for every rule beside plain and checkpointed backpropagation.

python benchmarks/memory.py gpt|conv [--vocabulary 512 8192] [--stages 1 2 3 4] [--rules ..] [--repeats 3] [--plot FILE]

The GPT has 12 blocks of width 256 and a batch of 4 x 256 tokens; the convolutional network 12 ConvNeXt-like blocks of width
64 and a batch of 128 images of 32 x 32 pixels. Memory is the most bytes of tensors that a step holds at once by
``rule.backward``, and by ``rule(x, y).loss.backward()``, which holds a second set of gradients, beside
weights, their gradients and the batch: on a GPU as the allocator counts them. Seconds are the median of steps that alternate
with plain backpropagation's, and a ratio of those. Needs torch and numpy alone; the plot matplotlib.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ledger
import torch
from gate import gate
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hbll
from hbll.models.convnet import ConvBlock, ConvHead, patch_embed
from hbll.models.gpt import GPTBlock, GPTEmbed, GPTHead
from hbll.train.memory import step_memory

BLOCKS = 12
IN_ORDER = {"states": "chain"}
RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "paper": ("paper", {}),
    "tree": ("tree", {}),
    "scan": ("scan", {}),
    "stream, pipelined": ("stream", {}),
    "stream": ("stream", IN_ORDER),
    "stream, one jump": ("stream", IN_ORDER | {"spine": "last"}),
    "greedy": ("greedy", IN_ORDER),
    "dgl": ("dgl", {}),
    "predsim": ("predsim", {}),
}


class Checkpointed(nn.Module):
    """A block that is evaluated again when it is walked back."""

    again = 0
    """Evaluations for the walk back, of all blocks so far."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, state: Tensor) -> Tensor:
        Checkpointed.again -= 1  # the first, which is none
        return checkpoint(self._evaluated, state, use_reentrant=False)

    def _evaluated(self, state: Tensor) -> Tensor:
        Checkpointed.again += 1
        return self.block(state)


def network(kind: str, vocabulary: int, checkpointed: bool) -> tuple[hbll.Chain, Tensor, Tensor]:
    """A network and a batch."""
    torch.manual_seed(0)
    if kind == "gpt":
        blocks: list[nn.Module] = [GPTBlock(256, 4, depth=BLOCKS) for _ in range(BLOCKS)]
        embed, head = GPTEmbed(vocabulary, 256, 256), GPTHead(vocabulary, 256)
        x, y = torch.randint(vocabulary, (4, 256)), torch.randint(vocabulary, (4, 256))
    else:
        blocks = [ConvBlock(64) for _ in range(BLOCKS)]
        embed, head = patch_embed(64), ConvHead(64, 10)
        x, y = torch.randn(128, 3, 32, 32), torch.randint(10, (128,))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chain = hbll.Chain(embed, map(Checkpointed, blocks) if checkpointed else blocks, head)
    return chain.to(device), x.to(device), y.to(device)


@dataclass
class Row:
    """What a rule came to."""

    rule: str
    stage: int | None
    checkpointed: bool
    backward: int
    forward: int
    work: float
    """Of backpropagation's, as counted, second evaluations of checkpointed blocks among them."""
    seconds: float
    """Of backpropagation's."""


def seconds(rule: hbll.Rule, x: Tensor, y: Tensor) -> float:
    """The time of a step."""
    for parameter in rule.parameters():
        parameter.grad = None
    began = time.perf_counter()
    rule.backward(x, y)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(kind: str, vocabulary: int, stages: list[int], names: list[str], repeats: int) -> Iterator[Row]:
    """The rows, plain backpropagation's first."""
    plain, x, y = network(kind, vocabulary, False)
    bp = hbll.make_rule("bp", plain)
    exact = bp.backward(x, y).work
    cases: list[tuple[str, str, dict[str, Any], int | None]] = [("bp", "bp", {}, None)]
    cases += [(name, *RULES[name], size) for name in names for size in stages]
    for title, name, options, size in cases:
        for checkpointed in (False, True):
            chain, x, y = network(kind, vocabulary, checkpointed)
            rule = hbll.make_rule(name, chain, x, **options, **({} if size is None else {"stage": size}))
            by_backward, by_forward = (step_memory(rule, x, y, by) for by in ("backward", "forward"))
            before = Checkpointed.again
            work = rule.backward(x, y).work
            work += Checkpointed.again - before
            pairs = [(seconds(rule, x, y), seconds(bp, x, y)) for _ in range(repeats)]
            ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
            yield Row(title, size, checkpointed, by_backward, by_forward, work / exact, ours / theirs)


def table(rows: list[Row]) -> str:
    """In Markdown, with shares of plain backpropagation's."""
    base = rows[0].backward
    lines = [
        "| rule | blocks in a stage | MiB by backward | share of bp's | MiB by forward | work | seconds / bp's |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = f"{row.rule}, checkpointed" if row.checkpointed else row.rule
        memory = f"{row.backward / 2**20:.1f} | {row.backward / base:.2f} | {row.forward / 2**20:.1f}"
        lines.append(f"| {name} | {row.stage or '-'} | {memory} | {row.work:.2f} | {row.seconds:.2f} |")
    return "\n".join(lines)


def plot(rows: list[Row], file: str) -> None:
    """Peak against work."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    base = rows[0].backward
    for number, name in enumerate(dict.fromkeys(row.rule for row in rows)):
        for checkpointed in (False, True):
            own = [row for row in rows if row.rule == name and row.checkpointed == checkpointed]
            style = {"color": f"C{number}", "marker": "o", "linestyle": ":" if checkpointed else "-"}
            axes.plot(
                [row.work for row in own],
                [row.backward / base for row in own],
                label=None if checkpointed else name,
                markerfacecolor="white" if checkpointed else f"C{number}",
                **style,
            )
            for row in own:
                if row.stage:
                    where = (row.work, row.backward / base)
                    axes.annotate(str(row.stage), where, xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.set_xlabel("work of a step, backpropagation's = 1 (numbers: blocks in a stage; hollow: blocks checkpointed)")
    axes.set_ylabel("peak memory of a step, backpropagation's = 1")
    axes.set_yscale("log")
    axes.set_yticks(ticks := [0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.5], [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=120)


def machine() -> str:
    """What this was measured on."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    threads = f"{torch.get_num_threads()} threads"
    return f"{name}, {threads}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}, commit {ledger.commit() or '?'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=["gpt", "conv"])
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[512])
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--rules", nargs="+", choices=list(RULES), default=list(RULES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", help="a file for the rows, a JSON object a line")
    parser.add_argument("--plot", help="a picture of peak against work")
    options = parser.parse_args()
    gate(["bp", *(RULES[title][0] for title in options.rules)])
    print(machine(), flush=True)
    for vocabulary in options.vocabulary if options.network == "gpt" else [0]:
        rows = []
        for row in measure(options.network, vocabulary, options.stages, options.rules, options.repeats):
            rows.append(row)
            if options.json:
                with open(options.json, "a") as stream:
                    stream.write(json.dumps({"network": options.network, "vocabulary": vocabulary} | vars(row)) + "\n")
        print(f"\n{options.network}{f', vocabulary {vocabulary}' if vocabulary else ''}\n\n{table(rows)}", flush=True)
        if options.plot:
            plot(rows, options.plot)


if __name__ == "__main__":
    main()
