"""RandAugment (Cubuk et al., arXiv 1909.13719): random operations on images, every image with its own.

The operations and their ranges are those of torchvision's `RandAugment`, the geometric ones interpolated linearly.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["rand_augment"]

LEVELS = 30
"""The largest magnitude."""

GREY = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in the brightness (ITU-R BT.601)."""

Operation = Callable[[Tensor, Tensor], Tensor]
"""(images (B, C, H, W) in [0, 1], signed share of the range (B, 1, 1, 1) in [-1, 1]) -> images."""


def rand_augment(images: Tensor, draw: np.random.Generator, operations: int = 2, magnitude: int = 9) -> Tensor:
    """Images after random operations, one after the other, each drawn for every image alone.

    Args:
        images: (B, 3, H, W) in [0, 1].
        draw: what all random numbers come from, on the CPU whatever the device of the images.
        operations: how many are applied to an image.
        magnitude: how strongly, 0 to 30.
    """
    names = list(OPERATIONS)
    for _ in range(operations):
        which = draw.integers(len(names), size=len(images))
        signs = torch.from_numpy(draw.choice([-1.0, 1.0], size=len(images))).to(images).view(-1, 1, 1, 1)
        strengths = signs * magnitude / LEVELS
        images = images.clone()
        for number in np.unique(which):
            chosen = torch.from_numpy(np.flatnonzero(which == number)).to(images.device)
            images[chosen] = OPERATIONS[names[number]](images[chosen], strengths[chosen])
    return images


def _affine(images: Tensor, entries: dict[tuple[int, int], Tensor]) -> Tensor:
    """Images moved by matrices (2, 3) that are the identity but for some entries (B,); what comes in is black."""
    matrices = torch.eye(2, 3).to(images).repeat(len(images), 1, 1)
    for (row, column), values in entries.items():
        matrices[:, row, column] = values
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def _moved(row: int, column: int, most: float) -> Operation:
    return lambda images, strength: _affine(images, {(row, column): most * strength.flatten()})


def _rotate(images: Tensor, strength: Tensor) -> Tensor:
    angle = np.pi / 6 * strength.flatten()
    cosine, sine = angle.cos(), angle.sin()
    return _affine(images, {(0, 0): cosine, (0, 1): -sine, (1, 0): sine, (1, 1): cosine})


def _blended(base: Callable[[Tensor], Tensor]) -> Operation:
    """Away from a plainer image, or towards it, by up to 0.9."""
    return lambda images, strength: torch.lerp(base(images), images, 1 + 0.9 * strength).clamp(0, 1)


def _grey(images: Tensor) -> Tensor:
    return (images * torch.tensor(GREY).to(images).view(3, 1, 1)).sum(1, keepdim=True).expand_as(images)


def _blurred(images: Tensor) -> Tensor:
    """Every pixel mixed with its neighbours, but for those at the edges."""
    kernel = torch.ones(3, 3).to(images)
    kernel[1, 1] = 5
    channels = images.shape[1]
    inner = F.conv2d(images, (kernel / 13).expand(channels, 1, 3, 3), groups=channels)
    result = images.clone()
    result[..., 1:-1, 1:-1] = inner
    return result


def _posterize(images: Tensor, strength: Tensor) -> Tensor:
    step = 2.0 ** (4 * strength.abs()).round()  # grey levels of 256 that become one
    return (255 * images / step).floor() * step / 255


def _solarize(images: Tensor, strength: Tensor) -> Tensor:
    return torch.where(images >= 1 - strength.abs(), 1 - images, images)


def _autocontrast(images: Tensor, strength: Tensor) -> Tensor:
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    return torch.where(high > low, (images - low) / (high - low).clamp_min(1e-6), images)


def _equalize(images: Tensor, strength: Tensor) -> Tensor:
    """Channel by channel as many pixels of one grey level as of any other, nearly; the arithmetic is Pillow's."""
    levels = (255 * images).round().long().flatten(2)
    counts = torch.zeros(*levels.shape[:2], 256, dtype=torch.long, device=images.device)
    counts.scatter_add_(2, levels, torch.ones_like(levels))
    last = counts.gather(2, levels.amax(2, keepdim=True))
    step = (counts.sum(2, keepdim=True) - last) // 255
    below = counts.cumsum(2) - counts
    table = ((below + step // 2) // step.clamp_min(1)).clamp_max(255)
    result = torch.where(step > 0, table.gather(2, levels), levels)
    return (result.to(images.dtype) / 255).view_as(images)


OPERATIONS: dict[str, Operation] = {
    "identity": lambda images, strength: images,
    "shear_x": _moved(0, 1, 0.3),
    "shear_y": _moved(1, 0, 0.3),
    "translate_x": _moved(0, 2, 2 * 150 / 331),
    "translate_y": _moved(1, 2, 2 * 150 / 331),
    "rotate": _rotate,
    "brightness": _blended(torch.zeros_like),
    "color": _blended(_grey),
    "contrast": _blended(lambda images: _grey(images).mean((2, 3), keepdim=True).expand_as(images)),
    "sharpness": _blended(_blurred),
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
}
