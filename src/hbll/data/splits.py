"""Labelled samples held in memory, or mapped into it: to train on, to choose by, and to test on."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """Inputs (n, ...) and their integer labels (n,), or (n, T) of sequences; a label of -100 is none."""

    inputs: Tensor
    labels: Tensor

    units: Mapping[str, int] = field(default_factory=dict)
    """What all labels together amount to in other units, such as the words and bytes of a text in tokens."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, which: slice | Tensor) -> "Samples":
        return Samples(self.inputs[which], self.labels[which])

    def to(self, device: torch.device) -> "Samples":
        return Samples(self.inputs.to(device), self.labels.to(device), self.units)


@dataclass(frozen=True)
class Splits:
    """What a network learns from and what it is measured on; no two of them share a sample.

    Training goes on for a fixed number of epochs and is measured on the test samples as it then stands. Where there are
    validation samples the weights that were best by them are kept beside. (The defaults of the recipe `digits` were once
    chosen by figures on its test samples: docs/findings.md.)
    """

    train: Samples
    test: Samples
    valid: Samples | None = None

    def to(self, device: torch.device) -> "Splits":
        return Splits(self.train.to(device), self.test.to(device), self.valid and self.valid.to(device))
