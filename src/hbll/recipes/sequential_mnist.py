"""Sequential MNIST: an image as a sequence of chunks of pixels, in their order or in a random one."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from hbll.data import Samples, Splits
from hbll.recipes.images import MnistImages
from hbll.recurrent import CELLS, DepthCells, RecurrentNetwork, RecurrentRule, make_rule

PIXELS = 784


@dataclass(frozen=True, kw_only=True)
class SequentialMnist(MnistImages):
    """A recurrent network on MNIST, chunk by chunk (the paper's section 4.5), by hbll, paper, bptt, bptt-fused or deer."""

    name: ClassVar[str] = "sequential-mnist"
    methods: ClassVar[tuple[str, ...]] = ("hbll", "paper", "bptt-fused")

    permuted: bool = False
    """Shuffle the pixels, all images alike."""

    cell: Literal["gru", "elman", "lstm"] = "gru"
    """The recurrent cell; the Elman cell has a sigmoid."""

    width: int = 128
    """Units of the hidden state (the paper has 2048)."""

    epochs: int = 20
    """Passes over the training samples (the paper makes 200)."""

    batch_size: int = 128
    """Samples of a step. What an epoch leaves over, fewer than that, waits for the next."""

    weight_decay: float = 1e-4
    """The optimizer's."""

    gradient_clip: float | None = 5.0
    """Norm that the gradients of the network, and those of the rule's own weights, are cut down to."""

    @property
    def length(self) -> int:
        """N: chunks of a sequence."""
        return self.block_count + 1

    @property
    def chunk_width(self) -> int:
        """Pixels of a chunk."""
        return -(-PIXELS // self.length)

    def load(self, data_dir: Path | None) -> Splits:
        splits = super().load(data_dir)
        valid = splits.valid and self._sequences(splits.valid)
        return Splits(self._sequences(splits.train), self._sequences(splits.test), valid)

    def _sequences(self, samples: Samples) -> Samples:
        return replace(samples, inputs=self.sequences(samples.inputs))

    def sequences(self, images: Tensor) -> Tensor:
        """Images (n, 784) as (n, N, pixels of a chunk); where N does not divide 784, zeros come before the start."""
        if self.permuted:
            images = images[:, torch.from_numpy(np.random.default_rng(0).permutation(PIXELS))]
        missing = self.length * self.chunk_width - PIXELS
        return nn.functional.pad(images, (missing, 0)).view(-1, self.length, self.chunk_width)

    def network(self) -> RecurrentNetwork:
        depths = (self.length - 1).bit_length()
        return RecurrentNetwork(
            DepthCells(CELLS[self.cell], self.chunk_width, self.width, depths),
            head=nn.Linear(self.width, 10),
            length=self.length,
        )

    def rule(self, method: str, network: RecurrentNetwork, example: Tensor) -> RecurrentRule:
        return make_rule(method, network)
