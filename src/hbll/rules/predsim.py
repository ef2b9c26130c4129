"""Similarity matching and local prediction (predsim): Nøkland & Eidnes, arXiv 1901.06656."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hbll.losses import Loss, cross_entropy, mean_loss
from hbll.names import check_number
from hbll.network import Chain
from hbll.rule import Step
from hbll.rules.features import by_pixel, cosines
from hbll.rules.local import LocalRule

__all__ = ["PredSim", "similarity_loss", "similarity_matrix"]


def similarity_matrix(state: Tensor) -> Tensor:
    """Cosine similarities of samples, after centring each one's features: (B, ...) -> (B, B).

    Feature maps count by their standard deviation over pixels, which tells how much a feature varies and not where.
    """
    features = by_pixel(state)
    features = features.squeeze(2) if features.shape[2] == 1 else features.std(2)
    return cosines(features - features.mean(1, keepdim=True), eps=1e-8)


def similarity_loss(state: Tensor, y: Tensor, classes: int) -> Tensor:
    """Mean squared difference between the similarities of samples and those of their one-hot labels.

    Args:
        state: (B, ...).
        y: classes, (B,).
    """
    # Centred one-hot vectors of C classes have the cosine 1 with themselves and -1 / (C - 1) with one another.
    wanted = (classes * (y[:, None] == y).to(state.dtype) - 1) / (classes - 1)
    return F.mse_loss(similarity_matrix(state), wanted)


class PredSim(LocalRule):
    """Every stage matches similarities to the labels' and predicts the label linearly from its pooled features.

    Published, test error of backpropagation in brackets: MNIST, 3 x 1024 layers 0.62 % (0.75), VGG8b 0.31 (0.26); CIFAR-10,
    VGG8b 5.58 (5.99), VGG11b with triple width 3.97 (5.02). The map before similarity matching, as large as a layer, counts
    as one evaluation beside each stage, forth and back. The head learns from what the last stage hands on.

    Args:
        network, stage, loss: as of ``LocalRule``.
        beta: the share of similarity matching in a stage's loss; the rest is prediction, as is the head's.
        pooled: the features that prediction starts from at most; larger feature maps are averaged down (the paper: 2048 or
            4096 on CIFAR-10, 1024 on MNIST).
    """

    apart: ClassVar[bool] = True
    beside_cost: ClassVar[int] = 1

    def __init__(
        self,
        network: Chain,
        *,
        stage: int | Sequence[int] = 1,
        beta: float = 0.99,
        pooled: int = 2048,
        loss: Loss = cross_entropy,
    ) -> None:
        super().__init__(network, stage=stage, loss=loss)
        check_number("beta", beta)
        if not 0 <= beta <= 1:
            raise ValueError(f"beta is a share, from 0 to 1; got {beta}")
        check_number("pooled", pooled, least=1)
        self.beta = beta
        self.pooled = pooled
        self.expect(1, 2)

    def made(self, shapes: Sequence[torch.Size], classes: int) -> Sequence[Sequence[nn.Module]]:
        matchers = [matcher(shape) for shape in shapes]
        predictors = [predictor(shape, classes, self.pooled) for shape in shapes]
        return list(zip(matchers, predictors, strict=True))

    def classifier(self, stage: int) -> nn.Module:
        return self.auxiliary(stage)[1]

    def local_loss(self, k: int, rows: Tensor, classes: Tensor) -> Tensor:
        match, predict = self.auxiliary(k)
        prediction = predict(rows)
        matching = similarity_loss(match(rows), classes, prediction.shape[-1])
        return self.beta * matching + (1 - self.beta) * mean_loss(self.loss, prediction, classes)

    def label_loss(self, logits: Tensor, y: Any, step: Step) -> Tensor:
        return (1 - self.beta) * super().label_loss(logits, y, step)


def matcher(shape: Sequence[int]) -> nn.Module:
    """The linear map of a state before its similarities are taken; of feature maps a 3 x 3 convolution."""
    if len(shape) == 3:
        return nn.Conv2d(shape[0], shape[0], 3, padding=1, bias=False)
    return nn.Linear(shape[-1], shape[-1], bias=False)


def predictor(shape: Sequence[int], classes: int, pooled: int) -> nn.Module:
    """The linear map from a state to logits, at first 0; height and width are halved in turn down to ``pooled`` features."""
    rows, columns = shape[1:] if len(shape) == 3 else (1, 1)
    features = shape[0] if len(shape) == 3 else math.prod(shape)
    while features * rows * columns > pooled and rows * columns > 1:
        rows, columns = (math.ceil(rows / 2), columns) if rows >= columns else (rows, math.ceil(columns / 2))
    pool = [nn.AdaptiveAvgPool2d((rows, columns))] if len(shape) == 3 else []
    linear = nn.Linear(features * rows * columns, classes)
    nn.init.zeros_(linear.weight)
    return nn.Sequential(*pool, nn.Flatten(), linear)
