"""Decoupled greedy learning (DGL): Belilovsky, Eickenberg & Oyallon, arXiv 1901.08164."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hbll.losses import Loss, cross_entropy, mean_loss
from hbll.names import check_number
from hbll.network import Chain
from hbll.rule import StageLoss, Step
from hbll.rules.local import LocalRule

__all__ = ["DecoupledGreedy", "auxiliary_network"]


class DecoupledGreedy(LocalRule):
    """Every stage but the last predicts the label through an auxiliary network of its own; the last one has the head.

    Published: CIFAR-10 and ImageNet at about backpropagation's accuracy, with auxiliary networks of a few percent of the
    network's arithmetic. Here each counts as one evaluation beside its stage, forth and back, which is more than that.

    Args:
        network, stage, loss: as of ``LocalRule``.
        hidden: hidden layers of the auxiliary networks' classifiers, 3 in the paper.
    """

    beside_cost: ClassVar[int] = 1

    def __init__(
        self, network: Chain, *, stage: int | Sequence[int] = 1, hidden: int = 3, loss: Loss = cross_entropy
    ) -> None:
        super().__init__(network, stage=stage, loss=loss)
        check_number("hidden", hidden, least=0)
        self.hidden = hidden
        # Of images: a weight and a norm's two of three convolutions; of each hidden layer two and two; then two.
        self.expect(3 * 3 + 4 * hidden + 2, last=False)

    def made(self, shapes: Sequence[torch.Size], classes: int) -> Sequence[Sequence[nn.Module]]:
        return [[auxiliary_network(shape, classes, self.hidden)] for shape in shapes[:-1]]

    def classifier(self, stage: int) -> nn.Module:
        (predict,) = self.auxiliary(stage)
        return predict

    def losses(self, x: Any, y: Any, step: Step) -> Iterator[StageLoss]:
        self.build(x)
        statistics = [(buffer, buffer.clone()) for buffer in self.beside.buffers()]
        try:
            yield from super().losses(x, y, step)
        except Exception:  # a step that fails leaves everything as it was
            for buffer, before in statistics:
                buffer.copy_(before)
            raise

    def local_loss(self, k: int, rows: Tensor, classes: Tensor) -> Tensor:
        return mean_loss(self.loss, self.classifier(k)(rows), classes)


def auxiliary_network(shape: Sequence[int], classes: int, hidden: int) -> nn.Module:
    """From a state (B, *shape) to logits: the paper's MLP-SR.

    Feature maps are averaged down to a quarter of each side, pass three 1 x 1 convolutions and are averaged down to 2 x 2;
    a multilayer perceptron as wide as that classifies them. States of vectors go to the perceptron at once, and so does a
    token with a label of its own; tokens with one label go as their mean.
    """
    if len(shape) == 3:
        maps, rows, columns = shape
        reduce = nn.AdaptiveAvgPool2d((math.ceil(rows / 4), math.ceil(columns / 4)))
        mix = [
            layer
            for _ in range(3)
            for layer in (
                nn.Conv2d(maps, maps, 1, bias=False),
                nn.BatchNorm2d(maps),
                nn.ReLU(),
            )
        ]
        start, width = [reduce, *mix, nn.AdaptiveAvgPool2d(2), nn.Flatten()], 4 * maps
    else:
        start, width = [_Mean()] if len(shape) == 2 else [], shape[-1]
    deep = [layer for _ in range(hidden) for layer in (nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU())]
    return nn.Sequential(*start, *deep, nn.Linear(width, classes))


class _Mean(nn.Module):
    """The mean over tokens, (B, T, F) -> (B, F)."""

    def forward(self, state: Tensor) -> Tensor:
        return state.mean(1)
