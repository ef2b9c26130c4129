"""What every recipe on CIFAR-10 has: the images, shifted and mirrored at random."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from hbll.data import Splits
from hbll.data.augment import crop_and_flip
from hbll.data.cifar import cifar10
from hbll.recipes.base import Recipe, Schedule


@dataclass(frozen=True, kw_only=True)
class Cifar10Images(Recipe):
    """The data, and how they are gone through."""

    batch_size: int = 128
    """Samples of a step. What an epoch leaves over, fewer than that, waits for the next: rules may keep batches."""

    schedule: Schedule = "cosine"
    """How the learning rate goes on over the steps: as it is, down to 0 in a straight line, or along a cosine."""

    def load(self, data_dir: Path | None) -> Splits:
        return cifar10(data_dir)

    def augment(self, inputs: Tensor, draw: np.random.Generator) -> Tensor:
        return crop_and_flip(inputs, draw)
