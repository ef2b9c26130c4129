"""Augmentation of images: the same ones in another place, by a random generator of the caller's."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["crop_and_flip"]

MARGIN = 4
"""Pixels that an image is moved by at most, in either direction."""


def crop_and_flip(images: Tensor, draw: np.random.Generator) -> Tensor:
    """Random shifts by up to 4 pixels and mirrorings from left to right, each image its own.

    Args:
        images: (B, C, H, W).
        draw: what all random numbers come from, on the CPU whatever the device of the images.

    Returns:
        (B, C, H, W); what a shift brings in from outside is 0.
    """
    count, channels, height, width = images.shape
    rows, columns = (draw.integers(2 * MARGIN + 1, size=(count, 1)) + np.arange(pixels) for pixels in (height, width))
    columns = np.where(draw.random((count, 1)) < 0.5, columns[:, ::-1], columns)
    which, channel = np.arange(count)[:, None, None, None], np.arange(channels)[:, None, None]
    index = (which, channel, rows[:, None, :, None], columns[:, None, None, :])
    padded = F.pad(images, (MARGIN,) * 4)
    return padded[tuple(torch.from_numpy(part).to(images.device) for part in index)]
