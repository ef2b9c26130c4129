"""Digits of 8 x 8 pixels: the smallest real data, embedded, so that everything can be tried in seconds."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import nn

from hbll import data
from hbll.data import Splits
from hbll.models.mlp import SkipBlock
from hbll.network import Chain
from hbll.recipes.base import ChainRecipe
from hbll.recipes.images import ImageRecipe


@dataclass(frozen=True, kw_only=True)
class Digits(ImageRecipe, ChainRecipe):
    """ReLU blocks with a skip on scikit-learn's bundled digits (needs no download)."""

    name: ClassVar[str] = "digits"
    image: ClassVar[tuple[int, int, int]] = (1, 8, 8)
    threads: ClassVar[int | None] = 1
    methods: ClassVar[tuple[str, ...]] = ("stream", "greedy", "paper", "bp")

    width: int = 64
    """Units of every state."""

    epochs: int = 30
    """Passes over the training samples."""

    learning_rate: float = 2e-3
    """The optimizer's, at its highest."""

    def images(self, data_dir: Path | None) -> Splits:
        return data.digits()

    def network(self) -> Chain:
        return Chain(
            embed=nn.Linear(64, self.width),
            blocks=[SkipBlock(self.width) for _ in range(self.block_count)],
            head=nn.Linear(self.width, 10),
        )
