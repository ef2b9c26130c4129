"""Losses at the label: one value per sample or per token, in nats."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "IGNORED",
    "Loss",
    "check_labels",
    "check_prediction",
    "counts",
    "cross_entropy",
    "mean_loss",
    "mean_losses",
    "row_means",
    "sample_losses",
    "squared_error",
    "takes_known_labels",
    "wide",
]

Loss: TypeAlias = Callable[[Any, Any], Tensor | tuple[Tensor, Tensor]]
"""(prediction, y) -> one value per sample, shape (B,), or per token, shape (B, T); or a pair of such values and of weights
of the same shape, 0 where a label is to be ignored, which every mean then respects."""

IGNORED = -100
"""The class label that stands for none, as in torch's cross-entropy."""

TORCHS = (nn.CrossEntropyLoss, nn.NLLLoss)
"""torch's losses of classes."""


def cross_entropy(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax cross-entropy of class labels, per sample or per token; labels of -100 are ignored.

    Args:
        logits: (B, C) or (B, T, C).
        y: integer classes, (B,) or (B, T).

    Raises:
        ValueError: the labels are no integers, there is not one for each sample or token, or one is outside the classes (a
            CUDA device stops with an assertion).
    """
    _check_form(check_prediction(logits).shape, y)
    y = y.long()  # a byte cannot hold what stands for none: compared with it, 156 would be that
    try:
        values = F.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="none", ignore_index=IGNORED)
    except IndexError as error:
        raise ValueError(
            f"labels must be classes 0..{logits.shape[-1] - 1}, which the head predicts: {error}"
        ) from error
    return values.view(y.shape), y != IGNORED


def check_prediction(prediction: Any) -> Tensor:
    """What the losses of this file take: ValueError unless the head returned one tensor."""
    if not isinstance(prediction, Tensor):
        raise ValueError(
            f"the head returns a {type(prediction).__name__}, and this loss takes one tensor: let the head return that, or "
            "give a loss= that takes what it returns"
        )
    return prediction


def _check_form(scores: torch.Size, y: Any) -> None:
    if len(scores) < 2:
        raise ValueError(
            f"the head gives scores {tuple(scores)}, without a dimension for the samples: hand over batches, one sample as "
            "x.unsqueeze(0) with a label (1,)"
        )
    if not isinstance(y, Tensor) or y.is_floating_point() or y.shape != scores[:-1]:
        got = f"{tuple(y.shape)} of {y.dtype}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
        # Such as (B, C, H, W) of an image's pixels: classes where torch's losses have them.
        last = isinstance(y, Tensor) and y.shape == scores[:1] + scores[2:]
        how = "; let the head have classes last, or give loss=nn.CrossEntropyLoss(reduction='none')" if last else ""
        raise ValueError(
            f"the head's scores {tuple(scores)} take integer labels {tuple(scores[:-1])}, one for each sample or token; got "
            f"{got}{how}"
        )


def takes_known_labels(loss: Loss) -> bool:
    """Whether it is known what labels a loss takes."""
    return loss in (cross_entropy, squared_error)


def check_labels(loss: Loss, scores: torch.Size, y: Any) -> None:
    """Looks at labels before their batch comes to the head, if their loss is known.

    Args:
        scores: the shape of what the head will give.

    Raises:
        ValueError: as the loss. Classes outside the head's are seen on a CPU alone; a CUDA device would have to be waited
            for.
    """
    if loss is cross_entropy:
        _check_form(scores, y)
        y = y.long()
        wrong = (y != IGNORED) & ((y < 0) | (y >= scores[-1]))
        if y.device.type == "cpu" and bool(wrong.any()):
            raise ValueError(
                f"labels must be classes 0..{scores[-1] - 1}, which the head predicts: {y[wrong][0].item()} is out of bounds"
            )
    elif loss is squared_error and (not isinstance(y, Tensor) or y.shape != scores):
        got = tuple(y.shape) if isinstance(y, Tensor) else f"a {type(y).__name__}"
        raise ValueError(f"predictions {tuple(scores)} take labels of that shape; got {got}")


def counts(loss: Loss, y: Any) -> Tensor | None:
    """Whether any label of a batch does, a scalar of 0 or 1; None where a loss is not known to leave labels out."""
    ignored = _ignored(loss, y)
    # A byte cannot hold what stands for none: compared with it, 156 would be that.
    return None if ignored is None else (y.long() != ignored).any()


def _ignored(loss: Loss, y: Any) -> int | None:
    """The class label that a loss leaves out; None where it is not known to leave one out of such labels."""
    if not isinstance(y, Tensor):
        return None
    if isinstance(loss, TORCHS) and not y.is_floating_point():
        return loss.ignore_index
    return IGNORED if loss is cross_entropy else None


def squared_error(prediction: Tensor, y: Tensor) -> Tensor:
    """Negative log-likelihood of a Gaussian with variance 1, ||prediction - y||^2 / 2, summed over the last dimension.

    Args:
        prediction, y: (B, K) or (B, T, K).

    Raises:
        ValueError: they differ in shape.
    """
    check_labels(squared_error, check_prediction(prediction).shape, y)
    return (prediction - y).square().sum(-1) / 2


def sample_losses(loss: Loss, prediction: Any, y: Any, counted: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The values of a loss, (B,) or (B, T), and their weights.

    Args:
        counted: of the same shape, 0 or false where a value is not to count; None if all do.

    Raises:
        ValueError: the loss is one number for the whole batch, so many that it broadcasts predictions and labels, or not as
            many as are to be counted.
    """
    returned = loss(prediction, y)
    values, weights = returned if isinstance(returned, tuple) else _weighted(loss, returned, y)
    if values.ndim == 0:
        raise ValueError(
            "the loss must return one value per sample, not their mean: torch's losses take reduction='none'"
        )
    sizes = [given.numel() for given in (prediction, y) if isinstance(given, Tensor)]
    if len(sizes) == 2 and values.numel() > max(sizes):
        raise ValueError(
            f"the loss returned values {tuple(values.shape)} for labels {tuple(y.shape)}: it is to return one per sample or "
            "token; give predictions and labels one shape"
        )
    if counted is not None and values.shape != counted.shape:
        raise ValueError(
            f"the loss returned values {tuple(values.shape)}, and of padded sequences only {tuple(counted.shape)} can "
            "be told apart: let it return one value per step"
        )
    return values, weights if counted is None else weights * counted


def _weighted(loss: Loss, values: Tensor, y: Any) -> tuple[Tensor, Tensor]:
    """Values and their weights, which torch's losses of classes have in them: ignored labels as 0, others times their
    class's weight."""
    weights = torch.ones_like(values)
    ignored = _ignored(loss, y)
    if isinstance(loss, TORCHS) and ignored is not None:
        y = y.long()
        counted = y != ignored
        weights = counted.to(values.dtype)
        if loss.weight is not None:
            weights = weights * loss.weight[torch.where(counted, y, 0)]
            values = values / torch.where(weights > 0, weights, 1)
    return values, weights


def row_means(values: Tensor, weights: Tensor, rows: int) -> Tensor:
    """The means, (rows,), of the values (rows * B, ...) of as many equal parts; values of weight 0 do not count."""
    values, weights = (values * weights).reshape(rows, -1), weights.reshape(rows, -1)
    total = weights.sum(1)
    return values.sum(1) / torch.where(total > 0, total, 1)


def mean_losses(loss: Loss, prediction: Tensor, y: Tensor, counted: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The mean loss of every row of predictions (n, B, ..., C) of labels (n, B, ...): (n,), with graph; and of how many
    samples each is the mean, by the weights of their labels, (n,).

    Labels of weight 0 do not count, nor do those that are not ``counted``, (n, B, ...).
    """
    counted = None if counted is None else counted.flatten(0, 1)
    values, weights = sample_losses(loss, prediction.flatten(0, 1), y.flatten(0, 1), counted)
    samples = weights.reshape(len(y), y.shape[1], -1).to(values.dtype).mean(2).sum(1)
    return row_means(values, weights, len(y)), samples


def mean_loss(loss: Loss, prediction: Any, y: Any, counted: Tensor | None = None) -> Tensor:
    """The mean loss of predictions (B, ..., C) of labels (B, ...), a scalar with graph; labels of weight 0 do not count, nor
    do those that are not ``counted``, (B, ...)."""
    return row_means(*sample_losses(loss, prediction, y, counted), 1).squeeze(0)


def wide(values: Tensor) -> Tensor:
    """At least float32: errors of half-precision states are summed over many features."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
