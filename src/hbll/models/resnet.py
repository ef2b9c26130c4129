"""ResNet-18 for small images (He et al., arXiv 1512.03385; the stem of its CIFAR networks) as a list of parts."""

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["BasicBlock", "resnet18"]

STAGES = (1, 2, 4, 8)
"""Channels of each stage, in multiples of the first one's; every stage has two blocks."""


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with batch norm around a skip, (B, before, H, W) -> (B, channels, H / stride, W / stride).

    Where the shape changes the skip is a 1 x 1 convolution with batch norm.
    """

    def __init__(self, before: int, channels: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(*normed_convolution(before, channels, 3, stride))
        self.second = nn.Sequential(*normed_convolution(channels, channels, 3, 1))
        same = before == channels and stride == 1
        self.skip = nn.Identity() if same else nn.Sequential(*normed_convolution(before, channels, 1, stride))

    def forward(self, state: Tensor) -> Tensor:
        return F.relu(self.skip(state) + self.second(F.relu(self.first(state))))


def resnet18(width: int = 64, channels: int = 3, classes: int = 10) -> list[nn.Module]:
    """A 3 x 3 stem without pooling, eight basic blocks in four stages, and the head: images to class logits.

    Args:
        width: channels of the first stage.
    """
    parts: list[nn.Module] = [nn.Sequential(*normed_convolution(channels, width, 3, 1), nn.ReLU())]
    before = width
    for multiple in STAGES:
        after = multiple * width
        parts += [BasicBlock(before, after, 1 if multiple == 1 else 2), BasicBlock(after, after, 1)]
        before = after
    return [*parts, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))]


def normed_convolution(before: int, after: int, kernel: int, stride: int) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """A convolution that keeps the size of an image, but for its stride, and batch norm."""
    convolution = nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return convolution, nn.BatchNorm2d(after)
