"""ResNet-18 on CIFAR-10: states change shape from stage to stage."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from torch import Tensor

from hbll.cuts import SequentialNetwork
from hbll.data import Splits
from hbll.data.augment import crop_and_flip
from hbll.data.cifar import cifar10
from hbll.models.resnet import resnet18
from hbll.recipes.base import Schedule
from hbll.recipes.cut_recipe import PlainRecipe


@dataclass(frozen=True, kw_only=True)
class Cifar10Resnet(PlainRecipe):
    """ResNet-18 with a 3 x 3 stem on CIFAR-10, whose states change shape, for bp and local rules."""

    name: ClassVar[str] = "cifar10-resnet"
    layers: ClassVar[int] = 9

    width: int = 64
    """Channels of the first stage; the last has eight times as many."""

    epochs: int = 200
    """Passes over the training samples."""

    batch_size: int = 128
    """Samples of a step. What an epoch leaves over, fewer than that, waits for the next: rules may keep batches."""

    schedule: Schedule = "cosine"
    """How the learning rate goes on over the steps: as it is, down to 0 in a straight line, or along a cosine."""

    def load(self, data_dir: Path | None) -> Splits:
        return cifar10(data_dir)

    def augment(self, inputs: Tensor, draw: np.random.Generator) -> Tensor:
        return crop_and_flip(inputs, draw)

    def network(self) -> SequentialNetwork:
        return SequentialNetwork(*resnet18(self.width))
