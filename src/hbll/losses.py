"""Losses at the label: one value per sample or per token, in nats."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Loss",
    "cross_entropy",
    "mean_loss",
    "mean_losses",
    "row_means",
    "sample_losses",
    "squared_error",
    "wide",
]

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
        ValueError: the labels are no integers, there is not one for each sample or token, or one is outside the classes (a
            CUDA device stops with an assertion).
    """
    if not isinstance(y, Tensor) or y.is_floating_point() or y.shape != logits.shape[:-1]:
        got = f"{tuple(y.shape)} of {y.dtype}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
        raise ValueError(
            f"the head's scores {tuple(logits.shape)} take integer labels {tuple(logits.shape[:-1])}, one for each sample "
            f"or token; got {got}"
        )
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

    Raises:
        ValueError: they differ in shape.
    """
    if prediction.shape != y.shape:
        raise ValueError(f"predictions {tuple(prediction.shape)} take labels of that shape; got {tuple(y.shape)}")
    return (prediction - y).square().sum(-1) / 2


def sample_losses(loss: Loss, prediction: Any, y: Any) -> tuple[Tensor, Tensor]:
    """The values of a loss, (B,) or (B, T), and their weights.

    Raises:
        ValueError: the loss is one number for the whole batch.
    """
    returned = loss(prediction, y)
    values, weights = returned if isinstance(returned, tuple) else (returned, torch.ones_like(returned))
    if values.ndim == 0:
        raise ValueError(
            "the loss must return one value per sample, not their mean: torch's losses take reduction='none'"
        )
    return values, weights


def row_means(values: Tensor, weights: Tensor, rows: int) -> Tensor:
    """The means, (rows,), of the values (rows * B, ...) of as many equal parts; values of weight 0 do not count."""
    values, weights = (values * weights).reshape(rows, -1), weights.reshape(rows, -1)
    return values.sum(1) / weights.sum(1).clamp_min(1)


def mean_losses(loss: Loss, prediction: Tensor, y: Tensor) -> Tensor:
    """The mean loss of every row of predictions (n, B, ..., C) of labels (n, B, ...): (n,), with graph.

    Labels of weight 0 do not count.
    """
    return row_means(*sample_losses(loss, prediction.flatten(0, 1), y.flatten(0, 1)), len(y))


def mean_loss(loss: Loss, prediction: Any, y: Any) -> Tensor:
    """The mean loss of predictions (B, ..., C) of labels (B, ...), a scalar with graph; labels of weight 0 do not count."""
    return row_means(*sample_losses(loss, prediction, y), 1).squeeze(0)


def wide(values: Tensor) -> Tensor:
    """At least float32: errors of half-precision states are summed over many features."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
