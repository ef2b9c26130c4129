"""Decoupled greedy learning (DGL): Belilovsky, Eickenberg & Oyallon, arXiv 1901.08164."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hbll.local.rule import Blocks, LocalRule, LocalStep, detached_pass, local_cost
from hbll.losses import mean_loss

__all__ = ["DecoupledGreedy", "auxiliary_network"]


class DecoupledGreedy(LocalRule):
    """Every block but the last predicts the label through an auxiliary network of its own; the last one has the head.

    Published: CIFAR-10 and ImageNet at about backpropagation's accuracy, with auxiliary networks of a few percent of the
    network's arithmetic. Here each counts as one evaluation beside its block, forth and back, which is more than that.

    Args:
        hidden: hidden layers of the auxiliary networks' classifiers, 3 in the paper.
        options: of ``LocalRule``.
    """

    def __init__(self, hidden: int = 3, **options: Any) -> None:
        super().__init__(**options)
        if hidden < 0:
            raise ValueError(f"hidden layers must be at least 0, not {hidden}")
        self.hidden = hidden

    def build(self, shapes: Sequence[torch.Size], classes: int) -> None:
        self.networks = nn.ModuleList(auxiliary_network(shape, classes, self.hidden) for shape in shapes[:-1])

    def step(self, blocks: Blocks, x: Tensor, y: Tensor) -> LocalStep:
        outputs = detached_pass(blocks.segments, x)
        predictors = [*self.networks, blocks.head.module]
        losses = [mean_loss(self.loss, predict(output), y) for output, predict in zip(outputs, predictors, strict=True)]
        return LocalStep(losses, *local_cost(blocks.segments, beside=[*(1 for _ in self.networks), 0]))

    def auxiliary(self, k: int) -> list[nn.Module]:
        return [self.networks[k - 1]] if k <= len(self.networks) else []


def auxiliary_network(shape: Sequence[int], classes: int, hidden: int) -> nn.Module:
    """From a state (B, *shape) to logits: the paper's MLP-SR.

    Feature maps are averaged down to a quarter of each side, pass three 1 x 1 convolutions and are averaged down to 2 x 2;
    a multilayer perceptron as wide as that classifies them. States of vectors go to the perceptron at once, tokens their
    mean. Norms are over the batch at hand: auxiliary networks are not deployed.
    """
    if len(shape) == 3:
        maps, rows, columns = shape
        reduce = nn.AdaptiveAvgPool2d((math.ceil(rows / 4), math.ceil(columns / 4)))
        mix = [
            layer
            for _ in range(3)
            for layer in (
                nn.Conv2d(maps, maps, 1, bias=False),
                nn.BatchNorm2d(maps, track_running_stats=False),
                nn.ReLU(),
            )
        ]
        start, width = [reduce, *mix, nn.AdaptiveAvgPool2d(2), nn.Flatten()], 4 * maps
    else:
        start, width = [_Mean()] if len(shape) == 2 else [], shape[-1]
    deep = [
        layer
        for _ in range(hidden)
        for layer in (nn.Linear(width, width), nn.BatchNorm1d(width, track_running_stats=False), nn.ReLU())
    ]
    return nn.Sequential(*start, *deep, nn.Linear(width, classes))


class _Mean(nn.Module):
    """The mean over tokens, (B, T, F) -> (B, F)."""

    def forward(self, state: Tensor) -> Tensor:
        return state.mean(1)
