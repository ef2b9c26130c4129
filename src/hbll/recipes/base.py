"""What every recipe is: its options, its data, its network, its training rule."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from hbll.data import Splits
from hbll.protocols import Network, TrainingRule
from hbll.recipes.measures import ACCURACY, Measure

Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """Options that every recipe has; ValueError for a value that cannot be."""

    name: ClassVar[str]
    """What the command line calls it."""

    methods: ClassVar[tuple[str, ...]] = ("paper", "tree", "bp")
    """The training rules that are compared unless others are asked for; the first is the one that trains."""

    threads: ClassVar[int | None] = None
    """CPU threads that training takes; None: torch's own number. Layers of a few hundred units are as fast on one thread,
    and then do not wait for each other's threads where other work runs beside."""

    measures: ClassVar[tuple[Measure, ...]] = (ACCURACY,)
    """What networks are measured by on the test samples; curves and spreads are of the first."""

    depth: int | None = None
    """Depth D of the tree: N = 2^D nodes after the input, 2^D - 1 blocks and the head (3 unless --blocks is given)."""

    blocks: int | None = None
    """Number of blocks, any from 1, instead of a depth."""

    width: int
    """Units of every state."""

    epochs: int
    """Passes over the training samples."""

    batch_size: int = 64
    """Samples of a step. What an epoch leaves over, fewer than that, waits for the next: rules may keep batches."""

    learning_rate: float = 1e-3
    """AdamW's, at its highest."""

    schedule: Schedule = "constant"
    """How the learning rate goes on over the steps: as it is, down to 0 in a straight line, or along a cosine."""

    weight_decay: float = 0.01
    """AdamW's."""

    gradient_clip: float | None = None
    """Norm that the gradients of the network, and those of the rule's own weights, are each cut down to."""

    train_samples: int | None = None
    """Train on the first so many samples alone."""

    def __post_init__(self) -> None:
        if self.depth is not None and self.blocks is not None:
            raise ValueError("give --depth or --blocks, not both")
        for option in ("depth", "blocks", "width", "epochs", "batch_size", "train_samples"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise ValueError(f"{flag(option)} must be at least 1, not {value}")
        if self.depth is not None and self.depth > 12:
            raise ValueError(f"--depth must be at most 12, not {self.depth}: it would need {2**self.depth - 1} blocks")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"--learning-rate must be above 0 and finite, not {self.learning_rate}")
        if self.gradient_clip is not None and not self.gradient_clip > 0:
            raise ValueError(f"--gradient-clip must be above 0, not {self.gradient_clip}")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"--weight-decay must be at least 0 and finite, not {self.weight_decay}")

    @property
    def block_count(self) -> int:
        """Number of blocks of the network, N - 1."""
        return self.blocks if self.blocks is not None else 2 ** (self.depth or 3) - 1

    def splits(self, data_dir: Path | None) -> Splits:
        """The samples to train and test on; ValueError when the data set is missing, damaged or too small."""
        splits = self.load(data_dir)
        if self.train_samples is not None and self.train_samples > len(splits.train):
            raise ValueError(f"--train-samples {self.train_samples} is more than the {len(splits.train)} there are")
        splits = Splits(splits.train[: self.train_samples], splits.test)
        if self.batch_size > len(splits.train):
            raise ValueError(f"--batch-size {self.batch_size} is more than the {len(splits.train)} training samples")
        return splits

    def initial_network(self, seed: int) -> Network:
        """The network before training; the same for every method, so that methods differ in nothing else."""
        torch.manual_seed(seed)
        return self.network()

    def augment(self, inputs: Tensor, draw: np.random.Generator) -> Tensor:
        """The inputs of a training batch as the network is to see them in this step, varied by `draw`; here as they are."""
        return inputs

    def reads(self, method: str, option: str) -> bool:
        """Whether a training rule depends on an option, which may be there for other rules."""
        return True

    def check_read(self, methods: Sequence[str]) -> None:
        """ValueError for an option that was given and that none of these methods reads."""
        for field in fields(self):
            given = getattr(self, field.name) != field.default
            if given and not any(self.reads(method, field.name) for method in methods):
                raise ValueError(f"{flag(field.name)} does nothing for {', '.join(methods)}: leave it out")

    @abstractmethod
    def objective(self, method: str) -> TrainingRule:
        """The training rule of that name; ValueError when there is none."""

    @abstractmethod
    def load(self, data_dir: Path | None) -> Splits:
        """The whole data set."""

    @abstractmethod
    def network(self) -> Network:
        """A network with newly drawn weights."""


def flag(option: str) -> str:
    """The command line's spelling of an option: `batch_size` -> `--batch-size`."""
    return "--" + option.replace("_", "-")
