"""Accuracy of the full chain by training rule: CIFAR-10 images and language models, beside backpropagation.

    python benchmarks/full_depth.py images --blocks 7 15 --train-samples 20000 --epochs 8 --seeds 0 1 --data-dir DIR
    python benchmarks/full_depth.py characters --blocks 7 --steps 2000 --data-dir DIR

One process a run, --workers at once on whatever device there is. Every finished epoch (or 200 steps of a language model) is
a line of OUT/full_depth.jsonl; a run whose last line stands there is not made again. The rules share data, order, initial
network, optimizer (AdamW, cosine schedule, no augmentation unless --augment), --learning-rates and budget; only the rule
differs.
The whole test set is used. Cosines are between a stage's update and backpropagation's on 256 training samples; of `scan`
from states computed ahead, on the batch that is due after a line's last step. MiB are the peak of a step by rule.backward,
beside weights, gradients and optimizer (until commit a4cb712 with the gradients).
"""

import argparse
import itertools
import math
import statistics
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import ledger
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hbll
from hbll.data import Splits, mnist
from hbll.data.augment import crop_and_flip
from hbll.data.cifar import cifar10
from hbll.models.convnet import ConvBlock, ConvHead, patch_embed
from hbll.models.gpt import GPTBlock, GPTEmbed, GPTHead
from hbll.train import fit
from hbll.train.memory import step_memory

RULES: dict[str, tuple[str, dict]] = {
    "bp": ("bp", {}),
    "bp rim": ("bp", {"rim": 0.3}),
    "paper": ("paper", {"variance": 10.0}),
    "tree": ("tree", {"variance": 10.0}),
    "scan G1 K4 C2 mean": ("scan", {"sweeps": 4, "credit_sweeps": 2, "guess": "mean"}),
    "scan G1 K3 C3 ahead": ("scan", {"sweeps": 3, "credit_sweeps": 3, "guess": "ahead"}),
    "scan G1 K4 C5 ahead": ("scan", {"sweeps": 4, "credit_sweeps": 5, "guess": "ahead"}),
    "scan G2 K3 C3 ahead": ("scan", {"stage": 2, "sweeps": 3, "credit_sweeps": 3, "guess": "ahead"}),
    "scan G2 K3 C5 ahead": ("scan", {"stage": 2, "sweeps": 3, "credit_sweeps": 5, "guess": "ahead"}),
    "scan G2 K5 C4 ahead": ("scan", {"stage": 2, "sweeps": 5, "credit_sweeps": 4, "guess": "ahead"}),
    "scan G1 K7 C7 T.1 ahead": ("scan", {"sweeps": 7, "credit_sweeps": 7, "tolerance": 0.1}),
    "scan G1 K3 C3 mean": ("scan", {"sweeps": 3, "credit_sweeps": 3, "guess": "mean"}),
    "scan G1 K6 C4 mean": ("scan", {"sweeps": 6, "credit_sweeps": 4, "guess": "mean"}),
    "scan G1 K8 C6 mean": ("scan", {"sweeps": 8, "credit_sweeps": 6, "guess": "mean"}),
    "scan G1 K3 C2 star": ("scan", {"sweeps": 3, "credit_sweeps": 2, "guess": "star"}),
    "scan G1 K4 C3 star": ("scan", {"sweeps": 4, "credit_sweeps": 3, "guess": "star"}),
    "scan G1 K2 C1 tree": ("scan", {"sweeps": 2, "credit_sweeps": 1, "guess": "tree"}),
    "scan G1 K4 C2 tree": ("scan", {"sweeps": 4, "credit_sweeps": 2, "guess": "tree"}),
    "scan G3 K2 C1 tree": ("scan", {"stage": 3, "sweeps": 2, "credit_sweeps": 1, "guess": "tree"}),
    "scan G3 K3 C2 tree": ("scan", {"stage": 3, "sweeps": 3, "credit_sweeps": 2, "guess": "tree"}),
    "scan G5 K2 C1 tree": ("scan", {"stage": 5, "sweeps": 2, "credit_sweeps": 1, "guess": "tree"}),
    "scan G2 K2 C1 tree": ("scan", {"stage": 2, "sweeps": 2, "credit_sweeps": 1, "guess": "tree"}),
    "scan G2 K3 C2 tree": ("scan", {"stage": 2, "sweeps": 3, "credit_sweeps": 2, "guess": "tree"}),
    "scan G4 K2 C1 tree": ("scan", {"stage": 4, "sweeps": 2, "credit_sweeps": 1, "guess": "tree"}),
    "scan G4 K3 C2 tree": ("scan", {"stage": 4, "sweeps": 3, "credit_sweeps": 2, "guess": "tree"}),
    "stream G1": ("stream", {}),
    "stream G1 right": ("stream", {"spine": "right"}),
    "stream G2 right": ("stream", {"stage": 2, "spine": "right"}),
    "stream G2": ("stream", {"stage": 2}),
    "stream G3": ("stream", {"stage": 3}),
    "stream G4": ("stream", {"stage": 4}),
    "stream G5": ("stream", {"stage": 5}),
    "stream G6": ("stream", {"stage": 6}),
    "stream G8": ("stream", {"stage": 8}),
    "stream G3-4": ("stream", {"stage": (3, 4)}),
    "stream G4-5-6": ("stream", {"stage": (4, 5, 6)}),
    "stream G2-2-3 last": ("stream", {"stage": (2, 2, 3), "spine": "last"}),
    "stream G1-2-2-2 right": ("stream", {"stage": (1, 2, 2, 2), "spine": "right"}),
    "stream G2-3-2 right": ("stream", {"stage": (2, 3, 2), "spine": "right"}),
    "stream G3 rim": ("stream", {"stage": 3, "rim": 0.3}),
    "stream G3 no spine": ("stream", {"stage": 3, "readout": "head"}),
    "greedy G3": ("greedy", {"stage": 3}),
    "greedy G3-4": ("greedy", {"stage": (3, 4)}),
    "greedy G5": ("greedy", {"stage": 5}),
    "greedy G1": ("greedy", {}),
    "chain spine G3": ("stream", {"states": "chain", "stage": 3}),
    "pipeline": ("pipeline", {}),
    "pipeline G3": ("pipeline", {"stage": 3}),
    "pipeline G5": ("pipeline", {"stage": 5}),
}


class Images:
    """CIFAR-10 with a ConvNeXt-like chain."""

    def __init__(self, options: argparse.Namespace, blocks: int, device: torch.device) -> None:
        splits = self.read(options.data_dir)
        self.train = splits.train[: options.train_samples].to(device)
        self.test = splits.test.to(device)
        self.batch_size, self.augment = options.batch_size, options.augment
        self.steps_per_line = len(self.train) // self.batch_size
        self.steps = options.epochs * self.steps_per_line
        self.network = self.build(blocks, options.width).to(device)

    def read(self, data_dir: Path) -> Splits:
        return cifar10(data_dir)

    def build(self, blocks: int, width: int | None) -> hbll.Chain:
        width = width or 32
        return hbll.Chain(patch_embed(width), [ConvBlock(width) for _ in range(blocks)], ConvHead(width, 10))

    def batches(self):
        draw = np.random.default_rng(torch.initial_seed())
        # Rules that hold several batches want them of one size, so nobody gets the last, short one.
        whole = len(self.train) // self.batch_size * self.batch_size
        while True:
            for batch in torch.randperm(len(self.train))[:whole].split(self.batch_size):
                samples = self.train[batch.to(self.train.labels.device)]
                yield (crop_and_flip(samples.inputs, draw) if self.augment else samples.inputs), samples.labels

    def probe(self) -> tuple[Tensor, Tensor]:
        return self.train.inputs[:256], self.train.labels[:256]

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        tree = self.network.tree
        result = {}
        for name, path in {"chain": tree.chain, "rim": tree.rim}.items():
            parts = self.test.inputs.split(1000)
            predicted = torch.cat([self.network(part, path).argmax(1) for part in parts])
            result[name] = (predicted == self.test.labels).float().mean().item()
        return result


class Plain(Images):
    """MNIST with normed ReLU layers without skips."""

    def read(self, data_dir: Path) -> Splits:
        return mnist(data_dir)

    def build(self, blocks: int, width: int | None) -> hbll.Chain:
        width = width or 128

        def layer(inputs: int) -> nn.Module:
            return nn.Sequential(nn.Linear(inputs, width), nn.LayerNorm(width), nn.ReLU())

        return hbll.Chain(layer(784), [layer(width) for _ in range(blocks)], nn.Linear(width, 10))


class Characters:
    """Tiny shakespeare by characters, the last tenth for testing."""

    context = 128

    def __init__(self, options: argparse.Namespace, blocks: int, device: torch.device) -> None:
        text = self.read(options.data_dir)
        vocabulary = int(text.max()) + 1
        split = len(text) * 9 // 10
        self.text, self.test = text[:split].to(device), text[split:].to(device)
        self.batch_size = options.batch_size
        self.steps, self.steps_per_line = options.steps, 200
        width = options.width or 64
        self.network = hbll.Chain(
            GPTEmbed(vocabulary, self.context, width),
            [GPTBlock(width, heads=max(2, width // 64), depth=blocks) for _ in range(blocks)],
            GPTHead(vocabulary, width),
        ).to(device)

    def read(self, data_dir: Path) -> Tensor:
        text = (data_dir / "tinyshakespeare" / "input.txt").read_text()
        index = {character: i for i, character in enumerate(sorted(set(text)))}
        return torch.tensor([index[character] for character in text])

    def batches(self):
        while True:
            starts = torch.randint(len(self.text) - self.context - 1, (self.batch_size,)).to(self.text.device)
            windows = self.text[starts[:, None] + torch.arange(self.context + 1, device=self.text.device)]
            yield windows[:, :-1], windows[:, 1:]

    def probe(self) -> tuple[Tensor, Tensor]:
        windows = self.text[: 32 * (self.context + 1)].view(32, -1)
        return windows[:, :-1], windows[:, 1:]

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        count = (len(self.test) - 1) // self.context
        inputs = self.test[: count * self.context].view(count, -1)
        labels = self.test[1 : count * self.context + 1].view(count, -1)
        result = {}
        for name in ("chain", "rim"):
            losses = [
                F.cross_entropy(self.network(x, name).flatten(0, 1), y.flatten(), reduction="sum")
                for x, y in zip(inputs.split(64), labels.split(64), strict=True)
            ]
            result[name] = (torch.stack(losses).sum() / labels.numel()).item()
        return result


class Subwords(Characters):
    """WikiText-2 in byte pairs, of which the training file decides; the test file for testing."""

    vocabulary = 2048

    def __init__(self, options: argparse.Namespace, blocks: int, device: torch.device) -> None:
        super().__init__(options, blocks, device)
        self.text, self.test = (self.tokens[part].to(device) for part in ("train", "test"))

    def read(self, data_dir: Path) -> Tensor:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers  # an extra, which this task alone needs

        lines = {
            part: (data_dir / "wikitext-2" / f"wiki.{part}.tokens").read_text().splitlines(keepends=True)
            for part in ("train", "test")
        }
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=self.vocabulary, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(lines["train"], trainer)
        self.tokens = {
            part: torch.tensor([token for line in tokenizer.encode_batch(found) for token in line.ids])
            for part, found in lines.items()
        }
        return torch.cat(list(self.tokens.values()))


TASKS = {"images": Images, "plain": Plain, "characters": Characters, "subwords": Subwords}


def run(job: tuple[int, str, int, float], options: argparse.Namespace) -> None:
    blocks, title, seed, rate = job
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    task = TASKS[options.task](options, blocks, device)
    name, settings = RULES[title]
    rule = hbll.make_rule(name, task.network, **settings).to(device)
    beside = [p for k in range(1, len(rule.stages) + 1) for part in rule.auxiliary(k) for p in part.parameters()]
    # Gradients of the network alone are clipped.
    groups = {1.0: list(task.network.parameters())} | ({None: beside} if beside else {})
    optimizers = [torch.optim.AdamW(parameters, lr=rate) for parameters in groups.values()]
    schedules = [torch.optim.lr_scheduler.OneCycleLR(o, rate, task.steps, pct_start=0.05) for o in optimizers]
    began, seconds, work, span = 0.0, 0.0, 0, 0

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal began
        for batch in itertools.islice(task.batches(), task.steps):
            began = time.perf_counter()
            yield batch

    def on_step(done: int, step: hbll.Step) -> None:
        nonlocal seconds, work, span
        if device.type == "cuda" and done % 50 == 0:
            torch.cuda.synchronize()
        seconds += time.perf_counter() - began
        work, span = work + step.work, span + step.span
        if done % task.steps_per_line == 0 or done == task.steps:
            line = {"task": options.task, "blocks": blocks, "rule": title, "seed": seed, "rate": rate}
            line |= {"step": done, "of": task.steps}
            line |= task.measure() | {"seconds": seconds, "work": work / done, "span": span / done}
            line["relative_work"], line["span_of_bp"] = line["work"] / (3 * blocks), line["span"] / (2 * blocks)
            if step.defect is not None:
                line["defect"] = step.defect.item()
            reports = rule.diagnose(*task.probe()).values()
            line["cosine"] = [round(report.cosine, 3) for report in reports if report.cosine is not None]
            if done == task.steps:
                line["peak_mib"] = step_memory(rule, *next(task.batches())) / 2**20
            ledger.append(options.out / "full_depth.jsonl", line)

    # The schedule ends with the last batch, and so does the training: what is in flight then is left there.
    fit(rule, batches(), optimizers, clip=[*groups], schedule=schedules, drain=False, on_step=on_step)


def table(lines: list[dict], better: str) -> str:
    """A row per rule and learning rate, and the cosines of its stages over training."""
    rows = [
        f"| blocks | rule | rate | span / BP's | work / BP's | chain {better} | rim {better} | MiB | s |",
        "|---" * 9 + "|",
    ]
    by_stage = [
        "| blocks | rule | rate | cosine of every stage after about a quarter, half and three quarters of the training |",
        "|---" * 4 + "|",
    ]
    every = runs_of(lines)
    for (blocks, rule, rate), found in runs_of([line for line in lines if line["step"] == line["of"]]).items():

        def show(what: str, found: list[dict] = found) -> str:
            accuracy = issubclass(TASKS[found[0]["task"]], Images)
            return ledger.mean_and_spread([100 * line[what] if accuracy else math.exp(line[what]) for line in found])

        rows.append(
            f"| {blocks} | {rule} | {rate:g} | {found[0]['span_of_bp']:.2f} | {found[0]['relative_work']:.2f} "
            f"| {show('chain')} | {show('rim')} | {found[0]['peak_mib']:.0f} "
            f"| {statistics.mean(line['seconds'] for line in found):.0f} |"
        )
        if rule != "bp" and found[0]["cosine"]:
            looked = [line["cosine"] for line in every[blocks, rule, rate] if line["seed"] == found[0]["seed"]]
            about = [looked[round(share * len(looked)) - 1] for share in (0.25, 0.5, 0.75)]
            cells = "; ".join(" ".join(f"{c:.2f}".removeprefix("0") for c in cosines) for cosines in about)
            by_stage.append(f"| {blocks} | {rule} | {rate:g} | {cells} |")
    return "\n".join([*rows, "", *by_stage])


def runs_of(lines: list[dict]) -> dict[tuple[int, str, float], list[dict]]:
    """Lines by depth, rule and learning rate, in the order of tables."""
    found: dict[tuple[int, str, float], list[dict]] = {}
    for line in sorted(lines, key=lambda line: (line["blocks"], list(RULES).index(line["rule"]), line["rate"])):
        found.setdefault((line["blocks"], line["rule"], line["rate"]), []).append(line)
    return found


def best(rates: list[list[dict]]) -> list[dict]:
    """The runs of the learning rate with the highest mean accuracy over the seeds that all rates have."""
    seeds = set.intersection(*({run["seed"] for run in runs} for runs in rates))
    return max(rates, key=lambda runs: statistics.mean(run["chain"] for run in runs if run["seed"] in seeds))


def plot(lines: list[dict], file: Path) -> None:
    """What every rule's chain loses against backpropagation's, by span and by work; a row of panels per depth.

    Each is shown at the learning rate that suits it best.
    """
    import matplotlib.pyplot as plt  # an extra, which the picture alone needs

    last = [line for line in lines if line["step"] == line["of"]]
    depths = sorted({line["blocks"] for line in last})
    figure, axes = plt.subplots(
        len(depths), 2, figsize=(10, 4 * len(depths)), sharey="row", squeeze=False, layout="constrained"
    )
    for row, blocks in zip(axes, depths, strict=True):
        rates: dict[str, list[list[dict]]] = {}
        for (depth, rule, _), runs in runs_of(last).items():
            if depth == blocks:
                rates.setdefault(rule, []).append(runs)
        found = {rule: best(several) for rule, several in rates.items()}
        exact = {line["seed"]: line["chain"] for line in found["bp"]}
        for axis, what, label in zip(row, ("span_of_bp", "relative_work"), ("span", "work"), strict=True):
            for number, (rule, runs) in enumerate(found.items()):
                lost = [100 * (run["chain"] - exact[run["seed"]]) for run in runs if run["seed"] in exact]
                x = [run[what] for run in runs if run["seed"] in exact]
                axis.scatter(x, lost, s=16, color=f"C{number}", alpha=0.5, linewidths=0)
                axis.scatter(x[:1], [statistics.mean(lost)], s=64, color=f"C{number}", label=rule)
            axis.axhline(0, color="0.8", zorder=0)
            axis.set_xlim(left=0)
            axis.set_xlabel(f"{label} / backpropagation's")
            axis.grid(alpha=0.2)
        row[0].set_ylabel(f"{blocks} blocks: points above backpropagation")
        row[1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(file, dpi=120)


def attempt(job: tuple[int, str, int, float], options: argparse.Namespace) -> None:
    try:
        run(job, options)
    except Exception:  # one run that fails must not take the others with it
        print(job, traceback.format_exc(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument(
        "--rules", nargs="+", choices=RULES, metavar="RULE", default=["bp", "stream G3"], help=", ".join(RULES)
    )
    parser.add_argument("--blocks", type=int, nargs="+", default=[7])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2000, help="of a language model")
    parser.add_argument("--train-samples", type=int, default=20000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-3])
    parser.add_argument("--width", type=int)
    parser.add_argument("--augment", action="store_true")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/full_depth"))
    parser.add_argument(
        "--plot", type=Path, help="file for a picture of accuracy by span and work, if bp is among the rules"
    )
    options = parser.parse_args()

    log = options.out / "full_depth.jsonl"
    done = {
        (line["blocks"], line["rule"], line["seed"], line["rate"])
        for line in ledger.read(log)
        if line["step"] == line["of"] and line["task"] == options.task
    }
    jobs = [
        job
        for seed, rate in itertools.product(options.seeds, options.learning_rates)
        for job in itertools.product(options.blocks, options.rules, [seed], [rate])
        if job not in done
    ]
    with torch.multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        pool.starmap(attempt, [(job, options) for job in jobs], chunksize=1)
    lines = [line for line in ledger.read(log) if line["task"] == options.task]
    print(table(lines, "%" if issubclass(TASKS[options.task], Images) else "perplexity"))
    if options.plot:
        plot(lines, options.plot)


if __name__ == "__main__":
    main()
