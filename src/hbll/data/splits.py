"""Labelled samples held in memory, split for training and for testing."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """Inputs (n, ...) and their integer labels (n,)."""

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, which: slice | Tensor) -> "Samples":
        return Samples(self.inputs[which], self.labels[which])

    def to(self, device: torch.device) -> "Samples":
        return Samples(self.inputs.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Splits:
    """What a network learns from and what it is measured on; the two share no sample.

    There is no validation split: training selects nothing by its figures, it goes on for a fixed number of epochs
    and is measured as it then stands. (The defaults of the recipe `digits` were once chosen by figures on its test
    samples: docs/findings.md.)
    """

    train: Samples
    test: Samples

    def to(self, device: torch.device) -> "Splits":
        return Splits(self.train.to(device), self.test.to(device))
