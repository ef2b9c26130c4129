"""A convolutional network on CIFAR-10 whose blocks keep the shape of the image of features."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from torch import Tensor

from hbll.data import Splits
from hbll.data.augment import crop_and_flip
from hbll.data.cifar import cifar10
from hbll.models.convnet import ConvBlock, ConvHead, patch_embed
from hbll.network import TreeNetwork
from hbll.recipes.base import Schedule
from hbll.recipes.tree_recipe import TreeRecipe

CLASSES = 10


@dataclass(frozen=True, kw_only=True)
class Cifar10Conv(TreeRecipe):
    """ConvNeXt-like blocks on patches of 4 x 4 pixels of CIFAR-10, whose images are shifted and mirrored at random."""

    name: ClassVar[str] = "cifar10-conv"

    width: int = 32
    """Features of every pixel of a state, which has 8 x 8."""

    epochs: int = 20
    """Passes over the training samples."""

    batch_size: int = 128
    """Samples of a step. What an epoch leaves over, fewer than that, waits for the next: rules may keep batches."""

    schedule: Schedule = "cosine"
    """How the learning rate goes on over the steps: as it is, down to 0 in a straight line, or along a cosine."""

    def load(self, data_dir: Path | None) -> Splits:
        return cifar10(data_dir)

    def augment(self, inputs: Tensor, draw: np.random.Generator) -> Tensor:
        return crop_and_flip(inputs, draw)

    def network(self) -> TreeNetwork:
        return TreeNetwork(
            embed=patch_embed(self.width),
            blocks=[ConvBlock(self.width) for _ in range(self.block_count)],
            head=ConvHead(self.width, CLASSES),
        )
