"""VGG8b on CIFAR-10, the convolutional network of Nøkland & Eidnes (arXiv 1901.06656)."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from torch import Tensor

from hbll.cuts import SequentialNetwork
from hbll.data import Splits
from hbll.data.augment import crop_and_flip
from hbll.data.cifar import cifar10
from hbll.models.vgg import vgg8b
from hbll.recipes.base import Schedule
from hbll.recipes.cut_recipe import PlainRecipe


@dataclass(frozen=True, kw_only=True)
class Cifar10Vgg(PlainRecipe):
    """VGG8b on CIFAR-10, for bp and the rules of networks cut into blocks (predsim 5.58 % error, bp 5.99)."""

    name: ClassVar[str] = "cifar10-vgg"
    layers: ClassVar[int] = 7

    width: int = 128
    """Feature maps of the first convolution; those of the others are multiples of it."""

    dropout: float = 0.2
    """Share of a layer's inputs that is dropped, except of the first one's."""

    epochs: int = 400
    """Passes over the training samples."""

    batch_size: int = 128
    """Samples of a step. What an epoch leaves over, fewer than that, waits for the next."""

    learning_rate: float = 5e-4
    """AdamW's, at its highest."""

    schedule: Schedule = "cosine"
    """How the learning rate goes on over the steps: as it is, down to 0 in a straight line, or along a cosine."""

    weight_decay: float = 0.0
    """AdamW's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout must be at least 0 and less than 1, not {self.dropout}")

    def load(self, data_dir: Path | None) -> Splits:
        return cifar10(data_dir)

    def augment(self, inputs: Tensor, draw: np.random.Generator) -> Tensor:
        return crop_and_flip(inputs, draw)

    def network(self) -> SequentialNetwork:
        return SequentialNetwork(*vgg8b(32, width=self.width, dropout=self.dropout))
