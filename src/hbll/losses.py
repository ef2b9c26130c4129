"""Losses at the label: one value per sample or per token, in nats."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Loss", "cross_entropy", "mean_loss", "mean_losses", "squared_error"]

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


def mean_losses(loss: Loss, prediction: Tensor, y: Tensor) -> Tensor:
    """The mean loss of every row of predictions (n, ..., C) of labels (n, ...): (n,), with graph.

    Labels of weight 0 do not count.
    """
    returned = loss(prediction, y)
    values, weights = returned if isinstance(returned, tuple) else (returned, torch.ones_like(returned))
    return (values * weights).flatten(1).sum(1) / weights.flatten(1).sum(1).clamp_min(1)


def mean_loss(loss: Loss, prediction: Tensor, y: Tensor) -> Tensor:
    """The mean loss of predictions (..., C) of labels (...), a scalar with graph; labels of weight 0 do not count."""
    return mean_losses(loss, prediction.unsqueeze(0), y.unsqueeze(0)).squeeze(0)
