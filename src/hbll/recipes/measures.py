"""Measures of how good predictions are; a recipe names those that its test samples are put to."""

from collections.abc import Callable
from dataclasses import dataclass
from math import log

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Measure:
    """A mean over labels."""

    name: str
    """Its key in JSON, such as `bits_per_character`."""

    values: Callable[[Tensor, Tensor], Tensor]
    """What is averaged: (logits (..., C), labels (...)) -> (...)."""

    percent: bool = False
    """Whether people read it in percent."""

    @property
    def title(self) -> str:
        """Its name for people."""
        return self.name.replace("_", " ")

    @property
    def scale(self) -> int:
        """What people read as 1."""
        return 100 if self.percent else 1

    @property
    def axis(self) -> str:
        """The title of an axis of scaled values."""
        return f"{self.title}, %" if self.percent else self.title

    def number(self, value: float) -> str:
        """A scaled value, without unit."""
        return f"{self.scale * value:.{2 if self.percent else 3}f}"

    def text(self, value: float | None) -> str:
        """A value as people read it; nothing for None, a mean that is not finite."""
        if value is None:
            return ""
        return f"{self.number(value)} %" if self.percent else self.number(value)


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.argmax(-1) == labels


def _nats(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").view(labels.shape)


def _bits(logits: Tensor, labels: Tensor) -> Tensor:
    return _nats(logits, labels) / log(2)


ACCURACY = Measure("accuracy", _right, percent=True)
"""Share of the labels that are the class with the largest logit."""

CROSS_ENTROPY = Measure("cross_entropy", _nats)
"""Softmax cross-entropy, in nats."""

BITS_PER_CHARACTER = Measure("bits_per_character", _bits)
"""Softmax cross-entropy in bits, where a label is a character."""

CHARACTER_MEASURES = (BITS_PER_CHARACTER, CROSS_ENTROPY, ACCURACY)
"""Of models that predict the next character."""
