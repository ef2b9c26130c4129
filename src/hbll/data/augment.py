"""Augmentation of images: the same ones in another place, by a random generator of the caller's."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["crop_and_flip", "shift"]

MARGIN = 4
"""Pixels that ``crop_and_flip`` moves an image by at most, in either direction."""


def crop_and_flip(images: Tensor, draw: np.random.Generator) -> Tensor:
    """Random shifts by up to 4 pixels and mirrorings from left to right, each image its own.

    Args:
        images: (B, C, H, W).
        draw: what all random numbers come from, on the CPU whatever the device of the images.

    Returns:
        (B, C, H, W); what a shift brings in from outside is 0.
    """
    rows, columns = _windows(images, draw, MARGIN)
    columns = np.where(draw.random((len(images), 1)) < 0.5, columns[:, ::-1], columns)
    return _take(F.pad(images, (MARGIN,) * 4), rows, columns)


def shift(images: Tensor, draw: np.random.Generator, margin: int) -> Tensor:
    """Random shifts by up to ``margin`` pixels alone; arguments and result as for ``crop_and_flip``."""
    return _take(F.pad(images, (margin,) * 4), *_windows(images, draw, margin))


def _windows(images: Tensor, draw: np.random.Generator, margin: int) -> tuple[np.ndarray, ...]:
    """Rows (B, H) and columns (B, W) of the padded images, a window for every image."""
    return tuple(
        draw.integers(2 * margin + 1, size=(len(images), 1)) + np.arange(pixels) for pixels in images.shape[2:]
    )


def _take(padded: Tensor, rows: np.ndarray, columns: np.ndarray) -> Tensor:
    which, channel = np.arange(len(padded))[:, None, None, None], np.arange(padded.shape[1])[:, None, None]
    index = (which, channel, rows[:, None, :, None], columns[:, None, None, :])
    return padded[tuple(torch.from_numpy(part).to(padded.device) for part in index)]
