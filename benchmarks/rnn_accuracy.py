"""Accuracy of recurrent networks on sequential and permuted sequential MNIST: the paper's rule, the scan, BPTT.

    python benchmarks/rnn_accuracy.py --data DIR --out benchmarks/results/rnn_accuracy --minutes 10

Every run is a process of its own, several at a time; results are written as they come, so that an interruption or the end
of the time leaves a table of what is done. All methods get the same epochs, batches and optimizer (AdamW 1e-3, weight decay
1e-4, clip 5, batch 128: the paper's). On a GPU a training step is one CUDA graph, but for bptt-fused, whose steps are few
launches of cuDNN. Needs torch, numpy, matplotlib.
"""

import argparse
import gzip
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import ledger
import numpy as np
import torch
from gate import gate
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from hbll.recurrent import (
    CELLS,
    Backpropagation,
    DepthCells,
    FusedBackpropagation,
    RecurrentNetwork,
    RecurrentRule,
    ScanRule,
    make_rule,
)

BATCH = 128
CLIP = 5.0


def read_idx(folder: Path, name: str) -> np.ndarray:
    """One of MNIST's files, gzipped or not."""
    packed = folder / f"{name}.gz"
    content = gzip.decompress(packed.read_bytes()) if packed.exists() else (folder / name).read_bytes()
    shape = np.frombuffer(content, ">i4", count=content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape)


def sequences(folder: Path, part: str, length: int, permuted: bool) -> tuple[Tensor, Tensor]:
    """Images as (n, N, I), pixel by pixel, zeros before the start where N does not divide 784; and their labels."""
    images = read_idx(folder, f"{part}-images-idx3-ubyte").reshape(-1, 784).astype(np.float32) / 255
    if permuted:
        images = images[:, np.random.default_rng(0).permutation(784)]
    width = -(-784 // length)
    padded = np.pad(images, ((0, 0), (length * width - 784, 0))).reshape(-1, length, width)
    return torch.from_numpy(padded), torch.from_numpy(read_idx(folder, f"{part}-labels-idx1-ubyte").astype(np.int64))


def rule_of(method: str, network: RecurrentNetwork) -> RecurrentRule:
    """A rule of hbll.recurrent by its name, or the scan with other options as ``hbll-G-K-Kc-guess[-shared]``."""
    if not method.startswith("hbll-"):
        return make_rule(method, network)
    _, chunk, sweeps, credit_sweeps, guess, *rest = method.split("-")
    return ScanRule(
        network,
        network.length,
        chunk=int(chunk),
        sweeps=int(sweeps),
        credit_sweeps=int(credit_sweeps),
        guess=guess,
        shared=rest == ["shared"],
    )


class Trainer:
    """A rule and its network; a step is a CUDA graph where there is a GPU."""

    def __init__(self, rule: RecurrentRule, x: Tensor, y: Tensor) -> None:
        self.rule, self.x, self.y = rule, x, y
        modules = [rule.network, *rule.auxiliary(1)]
        self.groups = [list(module.parameters()) for module in modules]
        self.optimizer = torch.optim.AdamW(rule.parameters(), lr=1e-3, weight_decay=1e-4, capturable=x.is_cuda)
        self.batch = torch.zeros(BATCH, dtype=torch.long, device=x.device)
        self.defect = self.loss = torch.zeros((), device=x.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.graphed = x.is_cuda and not isinstance(rule, FusedBackpropagation)
        self.done = 0

    def step(self, batch: Tensor) -> None:
        """One optimizer step on the samples of these indices."""
        self.batch.copy_(batch)
        if self.graph is not None:
            self.graph.replay()
        elif self.graphed and self.done < 3:  # warm-up, as torch asks for, off the default stream
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._step()
            torch.cuda.current_stream().wait_stream(stream)
        elif self.graphed:
            self.optimizer.zero_grad()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self._step()
            self.graph.replay()
        else:
            self._step()
        self.done += 1

    def _step(self) -> None:
        self.optimizer.zero_grad()
        step = self.rule.backward(self.x[self.batch], self.y[self.batch])
        for group in self.groups:
            clip_grad_norm_(group, CLIP)
        self.optimizer.step()
        assert step.label_loss is not None
        self.loss = step.label_loss
        if step.defect is not None:
            self.defect = step.defect
        self.work, self.span = step.work, step.span


@torch.no_grad()
def accuracy(network: RecurrentNetwork, x: Tensor, y: Tensor, path: str) -> float:
    """Percent of samples classified correctly along a path."""
    network.eval()
    right = 0
    for inputs, labels in zip(x.split(1000), y.split(1000), strict=True):
        right += int((network(inputs, path=path).argmax(-1) == labels).sum())
    network.train()
    return 100 * right / len(y)


def cosine(rule: RecurrentRule, x: Tensor, y: Tensor) -> float:
    """Between the rule's gradient of the deployed cell and BPTT's, on one batch; the rule's memory is left as it was."""
    rule.eval()
    weights = list(rule.network.cell.parameters())
    ours, exact = (
        torch.cat([g.flatten() for g in torch.autograd.grad(each(x, y).loss, weights)])
        for each in (rule, Backpropagation(rule.network))
    )
    rule.train()
    return torch.cosine_similarity(ours, exact, dim=0).item()


def run(job: dict) -> Iterator[dict]:
    """Trains, and yields what every epoch came to."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    length, permuted = 2 ** job["depth"], job["task"] == "psmnist"
    x, y = (part.to(device) for part in sequences(Path(job["data"]), "train", length, permuted))
    test = [part.to(device) for part in sequences(Path(job["data"]), "t10k", length, permuted)]
    x, y = x[: job["samples"]], y[: job["samples"]]
    torch.manual_seed(job["seed"])
    cells = DepthCells(CELLS[job["cell"]], x.shape[2], job["width"], job["depth"])
    network = RecurrentNetwork(cells, nn.Linear(job["width"], 10), length=length).to(device)
    trainer = Trainer(rule_of(job["method"], network).to(device), x, y)
    generator = np.random.default_rng(job["seed"])
    for epoch in range(1, job["epochs"] + 1):
        began = time.perf_counter()
        order = torch.from_numpy(generator.permutation(len(y))).to(device)
        losses = []
        for batch in order[: len(y) // BATCH * BATCH].split(BATCH):
            trainer.step(batch)
            losses.append(trainer.loss.clone())
        loss = torch.stack(losses).mean().item()
        seconds = time.perf_counter() - began
        line = {"epoch": epoch, "loss": loss, "seconds": seconds, "work": trainer.work, "span": trainer.span}
        line["chain"] = accuracy(network, *test, "chain")
        if job["method"] == "paper":
            line["tree"] = accuracy(network, *test, "tree")
        if job["method"].startswith("hbll"):
            line["defect"] = trainer.defect.item()
            if epoch == 1 or epoch == job["epochs"]:
                line["cosine"] = cosine(trainer.rule, x[:256], y[:256])
        yield line


def name_of(job: dict) -> str:
    return f"{job['task']}-{job['cell']}-d{job['depth']}-w{job['width']}-{job['method']}-s{job['seed']}"


def table(out: Path, jobs: list[dict]) -> str:
    """Markdown, a row per task, depth and method; means over the seeds that are done, and their number."""
    rows = {}
    for job in jobs:
        lines = ledger.read(out / f"{name_of(job)}.jsonl")
        if lines:
            rows.setdefault((job["task"], job["cell"], job["depth"], job["method"]), []).append(lines)
    text = [
        "| task | cell | N | method | chain % | tree % | epochs | seeds | span | work | defect | cosine | s / epoch |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (task, cell, depth, method), runs in rows.items():
        epochs = min(len(lines) for lines in runs)
        ends = [lines[epochs - 1] for lines in runs]

        def shown(key: str, form: str, ends: list[dict] = ends) -> str:
            return ", ".join(format(end[key], form) for end in ends if key in end) or "-"

        seconds = np.mean([line["seconds"] for lines in runs for line in lines])
        text.append(
            f"| {task} | {cell} | {2**depth} | {method} | {shown('chain', '.2f')} | {shown('tree', '.2f')} | {epochs} | "
            f"{len(runs)} | {ends[0]['span']} | {ends[0]['work']} | {shown('defect', '.3f')} | {shown('cosine', '.2f')} | "
            f"{seconds:.1f} |"
        )
    return "\n".join(text) + "\n"


def plot(out: Path, jobs: list[dict]) -> None:
    """Learning curves of the chain, a panel per task and depth."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    panels = sorted({(job["task"], job["depth"]) for job in jobs})
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.4), squeeze=False, layout="constrained")
    methods = list(dict.fromkeys(job["method"] for job in jobs))
    for (task, depth), panel in zip(panels, axes[0], strict=True):
        panel.set(title=f"{task}, N = {2**depth}", xlabel="epoch", ylabel="chain, %")
        for job in jobs:
            lines = ledger.read(out / f"{name_of(job)}.jsonl")
            if (job["task"], job["depth"]) == (task, depth) and lines:
                label = job["method"] if job["seed"] == 0 else None
                colour = f"C{methods.index(job['method'])}"
                panel.plot([e["epoch"] for e in lines], [e["chain"] for e in lines], color=colour, label=label)
        panel.legend()
    figure.savefig(out / "curves.png", dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of MNIST's idx files")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/rnn_accuracy"))
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--tasks", nargs="+", default=["psmnist", "smnist"])
    parser.add_argument("--depths", nargs="+", type=int, default=[6, 8, 4])
    parser.add_argument("--methods", nargs="+", default=["bptt-fused", "hbll", "paper"])
    parser.add_argument("--cell", default="gru", choices=list(CELLS))
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--samples", type=int, default=60000)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=6, help="runs at a time")
    parser.add_argument("--job", help="one run, as JSON; used by the parent process")
    arguments = parser.parse_args()
    if arguments.job:
        job = json.loads(arguments.job)
        with (arguments.out / f"{name_of(job)}.jsonl").open("w") as file:
            for line in run(job):
                print(json.dumps(line), file=file, flush=True)
        return
    gate(["recurrent"])
    arguments.out.mkdir(parents=True, exist_ok=True)
    shared = {key: getattr(arguments, key) for key in ("cell", "width", "epochs", "samples")}
    shared["data"] = str(arguments.data)
    jobs = [
        shared | {"task": task, "depth": depth, "method": method, "seed": seed}
        for seed in range(arguments.seeds)
        for depth in arguments.depths
        for task in arguments.tasks
        for method in arguments.methods
    ]
    deadline = time.monotonic() + 60 * arguments.minutes
    pending, running = list(jobs), []
    try:
        while (pending or running) and time.monotonic() < deadline:
            while pending and len(running) < arguments.workers:
                job = pending.pop(0)
                command = [sys.executable, __file__, "--data", job["data"], "--out", str(arguments.out)]
                running.append((job, subprocess.Popen([*command, "--job", json.dumps(job)])))
            time.sleep(0.5)
            for job, process in list(running):
                if process.poll() is not None:
                    running.remove((job, process))
                    print(f"{name_of(job)}: {'done' if process.returncode == 0 else 'FAILED'}", flush=True)
                    (arguments.out / "table.md").write_text(table(arguments.out, jobs))
    except KeyboardInterrupt:
        print("interrupted; the table has what is done")
    for _, process in running:
        process.terminate()
    for _, process in running:
        process.wait()
    text = table(arguments.out, jobs)
    (arguments.out / "table.md").write_text(text)
    plot(arguments.out, jobs)
    print(text)


if __name__ == "__main__":
    main()
