"""Measures of how good predictions are; a recipe names those that its test samples are put to."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import exp, log

import torch.nn.functional as F
from torch import Tensor

from hbll.losses import IGNORED


@dataclass(frozen=True)
class Measure:
    """A mean over labels, or a function of it."""

    name: str
    """Its key in JSON, such as `bits_per_character`."""

    values: Callable[[Tensor, Tensor], Tensor]
    """What is averaged: (logits (..., C), labels (...)) -> (...); 0 of a label that is to be ignored."""

    percent: bool = False
    """Whether it is a share that people read in percent; the more, the better, and of other measures the less."""

    per: str = "labels"
    """What a mean is taken over: labels, or another of the samples' units, such as words."""

    of_mean: Callable[[float], float] = float
    """What becomes of the mean, such as `exp`."""

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

    def best(self, values: Iterable[float]) -> float:
        """The best of some values."""
        return max(values) if self.percent else min(values)

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
    values = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none", ignore_index=IGNORED)
    return values.view(labels.shape)


def _among_five(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.topk(5).indices == labels[..., None]).any(-1)


def _bits(logits: Tensor, labels: Tensor) -> Tensor:
    return _nats(logits, labels) / log(2)


ACCURACY = Measure("accuracy", _right, percent=True)
"""Share of the labels that are the class with the largest logit."""

CROSS_ENTROPY = Measure("cross_entropy", _nats)
"""Softmax cross-entropy, in nats."""

BITS_PER_CHARACTER = Measure("bits_per_character", _bits)
"""Softmax cross-entropy in bits, where a label is a character."""

TOP_5_ACCURACY = Measure("top_5_accuracy", _among_five, percent=True)
"""Share of the labels that are among the five classes with the largest logits."""

PERPLEXITY = Measure("perplexity", _nats, of_mean=exp)
"""Of the tokens of a text: e to the power of the cross-entropy of a token."""

WORD_PERPLEXITY = Measure("word_perplexity", _nats, per="words", of_mean=exp)
"""The same of its words, by which models with other tokens compare: e to the power of the text's nats by its words."""

BITS_PER_BYTE = Measure("bits_per_byte", _bits, per="bytes")
"""The text's cross-entropy in bits by its bytes, likewise."""

TEXT_MEASURES = (PERPLEXITY, WORD_PERPLEXITY, BITS_PER_BYTE, ACCURACY)
"""Of models that predict the next token of a text."""

CHARACTER_MEASURES = (BITS_PER_CHARACTER, CROSS_ENTROPY, ACCURACY)
"""Of models that predict the next character."""
