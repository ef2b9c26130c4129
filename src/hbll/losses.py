"""Losses at the label: one value per sample or per token, in nats."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch.nn.functional as F
from torch import Tensor

__all__ = ["Loss", "cross_entropy", "squared_error"]

Loss: TypeAlias = Callable[[Any, Any], Tensor | tuple[Tensor, Tensor]]
"""(prediction, y) -> one value per sample, shape (B,), or per token, shape (B, T); or a pair of such values and of weights
of the same shape, 0 where a label is to be ignored, which every mean then respects."""

IGNORED = -100
"""The class label that stands for none, as in torch's cross-entropy."""


def cross_entropy(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax cross-entropy of class labels, per sample or per token; labels of -100 are ignored.

    Args:
        logits: (B, C) or (B, T, C).
        y: integer classes, (B,) or (B, T).

    Raises:
        ValueError: a label is outside the classes (a CUDA device stops with an assertion).
    """
    try:
        values = F.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="none", ignore_index=IGNORED)
    except IndexError as error:
        raise ValueError(
            f"labels must be classes 0..{logits.shape[-1] - 1}, which the head predicts: {error}"
        ) from error
    return values.view(y.shape), y != IGNORED


def squared_error(prediction: Tensor, y: Tensor) -> Tensor:
    """Negative log-likelihood of a Gaussian with variance 1, ||prediction - y||^2 / 2, summed over the last dimension.

    Args:
        prediction, y: (B, K) or (B, T, K).
    """
    return (prediction - y).square().sum(-1) / 2
