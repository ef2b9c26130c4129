"""Accuracy of the full chain by training rule, beside backpropagation, with any optimizer, at the rate that suits each.

    python benchmarks/full_depth.py characters --arms bp "stream (3,4)" "2bw ef" --optimizer muon --rates 4e-3 8e-3 1.6e-2
    python benchmarks/full_depth.py images --arms bp "scan sweeps=4" --train-samples 20000 --epochs 8 --seeds 0 1 2

An arm is a rule of hbll.make_rule and its options in one string: ``(3,4)`` or ``(2)`` is ``stage``, ``stages=4`` that many
stages as even as can be, ``option=value`` any other one; ``head``, ``solo`` are readouts, ``copies`` their copies; ``ef`` is
error feedback.

Arms share data, their order, the initial network and the budget. Each arm and optimizer is run at all --rates with the
first seed; while the one that is best on held-out training samples is the highest or lowest, one beyond is tried, too; the
other seeds are run at the best. With one rate nothing is searched. Test samples are looked at once, at the end of a run,
and choose nothing. Held out are the last twentieth of a text but for its test part (a tenth) or the validation file, and
5,000 images. Schedules are one-cycle, without a cycle of the momentum; gradients are clipped at 1.

A finished run is a line of OUT/full_depth.jsonl, and not made again; it says whether the gate was passed just before. Its
curve has the held-out metric, seconds of training so far, and the cosine of every stage's gradient with backpropagation's on
some training samples (of `scan` from states computed ahead on the batch then due; none of rules whose gradients are late).
--workers runs are made at once. Needs torch, numpy and safetensors, and tokenizers where byte pairs have not been made yet;
they are kept beside their text.
"""

import argparse
import ast
import itertools
import math
import re
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import leaderboard
import ledger
import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from gate import gate
from torch import Tensor, nn

import hbll
from hbll.cut import even
from hbll.data import mnist
from hbll.data.augment import crop_and_flip
from hbll.data.cifar import cifar10
from hbll.data.corpora import CORPORA, encoded
from hbll.models.convnet import ConvBlock, ConvHead, patch_embed
from hbll.models.gpt import GPTBlock, GPTEmbed, GPTHead
from hbll.train import fit, make_optimizers
from hbll.train.memory import step_memory
from hbll.train.optimizers import OPTIMIZERS
from hbll.train.rates import MOST_RATES, best_rate, next_rate

WORDS: dict[str, dict[str, Any]] = {
    "head": {"readout": "head"},
    "solo": {"readout": "solo", "refresh": 1},
    "copies": {"copies": True},
}

WEIGHT_DECAY = 0.01


class Images:
    """CIFAR-10 with a ConvNeXt-like chain."""

    metric, batch_size, width = "accuracy", 128, 32

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        splits = self.read(options.data_dir)
        self.parts = {"held_out": splits.train[-5000:].to(device), "test": splits.test.to(device)}
        self.train = splits.train[:-5000][: options.train_samples].to(device)
        self.size, self.augment = options.batch_size or self.batch_size, options.augment

    @staticmethod
    def read(data_dir: Path) -> Any:
        return cifar10(data_dir)

    def steps(self, options: argparse.Namespace) -> int:
        return options.epochs * (len(self.train) // self.size)

    def network(self, blocks: int, width: int) -> hbll.Chain:
        return hbll.Chain(patch_embed(width), [ConvBlock(width) for _ in range(blocks)], ConvHead(width, 10))

    def batches(self, seed: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        generator, draw = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
        # Rules that hold several batches want them of one size, so nobody gets the last, short one.
        whole = len(self.train) // self.size * self.size
        while True:
            for batch in torch.randperm(len(self.train), generator=generator)[:whole].to(device).split(self.size):
                samples = self.train[batch]
                yield (crop_and_flip(samples.inputs, draw) if self.augment else samples.inputs), samples.labels

    def probe(self) -> tuple[Tensor, Tensor]:
        return self.train.inputs[:256], self.train.labels[:256]

    @torch.no_grad()
    def measure(self, network: nn.Module, part: str) -> float:
        samples = self.parts[part]
        predicted = torch.cat([network(inputs).argmax(1) for inputs in samples.inputs.split(1000)])
        return (predicted == samples.labels).float().mean().item()


class Plain(Images):
    """MNIST with normed ReLU layers without skips."""

    width = 128

    @staticmethod
    def read(data_dir: Path) -> Any:
        return mnist(data_dir)

    def network(self, blocks: int, width: int) -> hbll.Chain:
        def layer(inputs: int) -> nn.Module:
            return nn.Sequential(nn.Linear(inputs, width), nn.LayerNorm(width), nn.ReLU())

        return hbll.Chain(layer(784), [layer(width) for _ in range(blocks)], nn.Linear(width, 10))


class Characters:
    """Tiny shakespeare by characters."""

    metric, batch_size, width, context = "loss", 16, 64, 128

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.tokens = {name: part.to(device) for name, part in self.read(options.data_dir).items()}
        self.vocabulary = 1 + max(int(part.max()) for part in self.tokens.values())
        self.size = options.batch_size or self.batch_size

    @staticmethod
    def read(data_dir: Path) -> dict[str, Tensor]:
        text = (data_dir / "tinyshakespeare" / "input.txt").read_text()
        index = {character: i for i, character in enumerate(sorted(set(text)))}
        tokens = torch.tensor([index[character] for character in text])
        train, held_out = len(text) * 17 // 20, len(text) * 9 // 10
        return {"train": tokens[:train], "held_out": tokens[train:held_out], "test": tokens[held_out:]}

    def steps(self, options: argparse.Namespace) -> int:
        return options.steps

    def network(self, blocks: int, width: int) -> hbll.Chain:
        return hbll.Chain(
            GPTEmbed(self.vocabulary, self.context, width),
            [GPTBlock(width, heads=max(2, width // 64), depth=blocks) for _ in range(blocks)],
            GPTHead(self.vocabulary, width),
        )

    def batches(self, seed: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        generator, text = torch.Generator().manual_seed(seed), self.tokens["train"]
        while True:
            starts = torch.randint(len(text) - self.context, (self.size, 1), generator=generator).to(device)
            windows = text[starts + torch.arange(self.context + 1, device=device)].long()
            yield windows[:, :-1], windows[:, 1:]

    def probe(self) -> tuple[Tensor, Tensor]:
        return self._windows(self.tokens["train"][: 32 * self.context + 1])

    def _windows(self, text: Tensor) -> tuple[Tensor, Tensor]:
        count = (len(text) - 1) // self.context
        inputs, labels = (text[a : count * self.context + a].view(count, -1).long() for a in (0, 1))
        return inputs, labels

    @torch.no_grad()
    def measure(self, network: nn.Module, part: str) -> float:
        inputs, labels = self._windows(self.tokens[part])
        losses = [
            F.cross_entropy(network(x).flatten(0, 1), y.flatten(), reduction="sum")
            for x, y in zip(inputs.split(64), labels.split(64), strict=True)
        ]
        return (torch.stack(losses).sum() / labels.numel()).item()


class Subwords(Characters):
    """WikiText-2 in byte pairs of its training file."""

    corpus = "wikitext-2"

    @classmethod
    def read(cls, data_dir: Path) -> dict[str, Tensor]:
        kept = data_dir / cls.corpus / "byte-pairs-2048.safetensors"
        if not kept.exists():
            # One more, for the first stands for the start of a text, and these tasks have windows from anywhere.
            tokens = encoded(CORPORA[cls.corpus], "bytepairs", 2049, data_dir).tokens
            parts = {part: torch.from_numpy((found - 1).astype(np.int16)) for part, found in tokens.items()}
            whole = kept.with_suffix(".part")
            safetensors.torch.save_file(parts, whole)
            whole.replace(kept)
        parts = safetensors.torch.load_file(kept)
        return {"train": parts["train"], "held_out": parts["valid"][: 2**17], "test": parts["test"]}


class Novels(Subwords):
    """A hundred novels in byte pairs, split by book; held out is the beginning of the validation file."""

    corpus = "novels"


TASKS = {"images": Images, "plain": Plain, "characters": Characters, "subwords": Subwords, "novels": Novels}


_tasks: dict[str, Images | Characters] = {}


def loaded(options: argparse.Namespace, device: str) -> Images | Characters:
    """The task, whose data a process reads once."""
    if device not in _tasks:
        _tasks[device] = TASKS[options.task](options, torch.device(device))
    return _tasks[device]


def parsed(arm: str, network: hbll.Chain) -> tuple[str, dict[str, Any], bool]:
    """The rule's name and options that an arm stands for, and whether there is error feedback.

    Raises:
        ValueError: a word has no meaning.
    """
    name, *words = re.findall(r"\([^)]*\)|\S+", arm)
    options: dict[str, Any] = {}
    for word in words:
        option, equals, value = word.partition("=")
        if word.startswith("("):
            options["stage"] = ast.literal_eval(word)
        elif option == "stages" and equals:
            options["stage"] = even(network, int(value))
        elif equals:
            try:
                options[option] = ast.literal_eval(value)
            except (ValueError, SyntaxError):  # a word
                options[option] = value
        elif word in WORDS:
            options = WORDS[word] | options
        elif word != "ef":
            raise ValueError(f"{arm!r} has no meaning at {word!r}: say (3,4), option=value, {', '.join(WORDS)} or ef")
    return name, options, "ef" in words


def one_cycle(
    optimizers: Iterable[torch.optim.Optimizer], rate: float, steps: int
) -> list[torch.optim.lr_scheduler.OneCycleLR]:
    """The schedules of a training: a twentieth of the steps up to the highest rate, and down from there."""
    # OneCycleLR would move momentum as well, which late gradients do not stand.
    return [
        torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.05, cycle_momentum=False)
        for optimizer in optimizers
    ]


def run(job: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """One training, as a line; of one that diverges the metrics are NaN."""
    device = torch.device(options.device)
    torch.set_num_threads(1)
    torch.manual_seed(job["seed"])
    task = loaded(options, options.device)
    network = task.network(job["blocks"], job["width"]).to(device)
    name, chosen, feedback = parsed(job["rule"], network)
    torch.manual_seed(job["seed"])
    rule = hbll.make_rule(name, network, task.probe()[0], **chosen).to(device)
    optimizers = make_optimizers(rule, job["optimizer"], job["rate"], WEIGHT_DECAY, error_feedback=feedback)
    schedules = one_cycle(optimizers, job["rate"], job["steps"])
    curve: list[dict[str, Any]] = []
    began, seconds, work, span, done = 0.0, 0.0, 0, 0, 0
    looks = {round(job["steps"] * share / options.looks) for share in range(1, options.looks + 1)}

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in itertools.islice(task.batches(job["seed"], device), job["steps"]):
            if curve and not math.isfinite(curve[-1]["held_out"]):
                return
            yield batch

    def on_step(number: int, step: hbll.Step) -> None:
        nonlocal began, seconds, work, span, done
        work, span, done = work + step.work, span + step.span, number
        if number in looks:
            seconds += clock() - began
            found = task.measure(network.eval(), "held_out")
            network.train()
            reports = rule.diagnose(*task.probe()).values() if math.isfinite(found) else []
            cosines = [round(report.cosine, 3) for report in reports if report.cosine is not None]
            point = {"step": number, "seconds": round(seconds, 2), "held_out": found, "cosine": cosines}
            curve.append(point | ({} if step.defect is None else {"defect": step.defect.item()}))
            began = clock()

    began = clock()
    # The schedule ends with the last batch, and so does the training: what is in flight then is left there.
    fit(rule, batches(), optimizers, clip=1.0, schedule=schedules, drain=False, on_step=on_step)
    memory = step_memory(rule, *next(task.batches(job["seed"], device)))
    results = {"metric": task.metric, "held_out": curve[-1]["held_out"], "test": task.measure(network.eval(), "test")}
    costs = {"seconds": seconds, "work": work / done, "span": span / done, "peak_mib": memory / 2**20}
    where = {"device": options.device, "workers": options.workers, "commit": options.commit, "gate": options.gate}
    where |= {"torch": torch.__version__}
    return job | results | costs | where | {"curve": curve}


class Study:
    """All runs of an arm with an optimizer, of which those that there are already are not made again."""

    lock = threading.Lock()

    def __init__(self, base: dict[str, Any], options: argparse.Namespace, pool: Executor, lines: list[dict]) -> None:
        self.base, self.options, self.pool, self.lines = base, options, pool, lines

    def line(self, rate: float, seed: int) -> dict[str, Any]:
        job = self.base | {"rate": rate, "seed": seed}
        if (known := ledger.find(self.lines, job)) is not None:
            return known
        line = self.pool.submit(run, job, self.options).result()
        with self.lock:
            self.lines.append(line)
            ledger.append(self.options.out / "full_depth.jsonl", line)
        print(f"{line['rule']}, {line['optimizer']}, {rate:g}, seed {seed}: {line['held_out']:.4f}", flush=True)
        return line

    def all_lines(self, rates: list[float], seeds: list[int]) -> list[dict[str, Any]]:
        jobs = list(itertools.product(rates, seeds))
        with ThreadPoolExecutor(max(1, len(jobs))) as threads:
            return list(threads.map(lambda job: self.line(*job), jobs))

    def finish(self) -> list[dict[str, Any]]:
        """All of them; of a run that fails the error is printed, and what there is is kept."""
        first, *others = self.options.seeds
        found: list[dict[str, Any]] = []
        due = sorted(self.options.rates)
        try:
            while due:
                found += self.all_lines(due, [first])
                scores = leaderboard.scores(found)
                beyond = next_rate(scores, self.options.most_rates)
                due = [] if beyond is None else [beyond]
            best, _ = best_rate(scores)
            found += self.all_lines([best], others)
        except Exception as error:  # one arm that fails must not take the others with it
            print(self.base, error.__cause__ or error, flush=True)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--arms", nargs="+", default=["bp", "stream (3,4)"])
    parser.add_argument("--optimizer", nargs="+", choices=OPTIMIZERS, default=["adamw"])
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3, 4e-3, 8e-3])
    parser.add_argument(
        "--most-rates", type=int, default=MOST_RATES, help="that are tried of an arm, if the best is at the edge"
    )
    parser.add_argument("--blocks", type=int, nargs="+", default=[7])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--epochs", type=int, default=8, help="over images")
    parser.add_argument("--steps", type=int, default=1000, help="of a language model")
    parser.add_argument("--train-samples", type=int, default=20000, help="images, 45,000 at most")
    parser.add_argument("--batch-size", type=int, help="by default 128 images, or 16 texts of 128")
    parser.add_argument("--width", type=int, help="by default 32 channels, or 64")
    parser.add_argument("--augment", action="store_true")
    parser.add_argument("--looks", type=int, default=10, help="at held-out samples and cosines during a run")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/full_depth"))
    parser.add_argument("--commit", default=ledger.commit(), help="to note, where there is no git")
    options = parser.parse_args()

    task = loaded(options, "cpu")  # which makes byte pairs once, for all workers
    arms = [*itertools.product(options.blocks, options.arms)]
    try:
        for blocks, arm in arms:
            network = task.network(blocks, task.width)
            name, chosen, _ = parsed(arm, network)
            hbll.make_rule(name, network, **chosen)
    except ValueError as error:
        parser.error(str(error))
    options.gate = gate(
        [*(arm.split()[0] for arm in options.arms), "train/test_optimizers.py", "train/test_error_feedback.py"]
    )

    images = isinstance(task, Images)
    setting = {"task": options.task, "width": options.width or task.width, "augment": options.augment}
    setting |= {"samples": len(task.train) if images else None, "batch_size": task.size, "steps": task.steps(options)}
    lines = ledger.read(options.out / "full_depth.jsonl")
    context = torch.multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, mp_context=context) as pool:
        studies = [
            Study(setting | {"blocks": blocks, "rule": arm, "optimizer": optimizer}, options, pool, lines)
            for (blocks, arm), optimizer in itertools.product(arms, options.optimizer)
        ]
        with ThreadPoolExecutor(len(studies)) as threads:
            found = [line for study in threads.map(Study.finish, studies) for line in study]
    print(leaderboard.tables(found))


if __name__ == "__main__":
    main()
