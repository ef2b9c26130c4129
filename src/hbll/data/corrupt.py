"""Corrupted data: pixels or patches of images erased, and labels replaced; always exactly the share that was asked for."""

import numpy as np
import torch
from torch import Tensor

__all__ = ["erase", "noisy_labels"]

ROWS = 1000
"""Images whose random numbers are drawn at once: bounds the memory, changes no result."""


def erase(images: Tensor, share: float, draw: np.random.Generator, patch: int = 1) -> Tensor:
    """Images of which a share of the patches, each image its own, is 0 in all channels.

    Args:
        images: (B, C, H, W).
        share: of the patches, 0 to 1; their number is rounded.
        draw: what all random numbers come from, on the CPU whatever the device of the images.
        patch: pixels of a side; 1 erases pixel by pixel. It divides H and W.
    """
    rows, columns = (pixels // patch for pixels in images.shape[2:])
    erased = round(share * rows * columns)
    masks = []
    for part in range(0, len(images), ROWS):
        order = draw.random((min(ROWS, len(images) - part), rows * columns), dtype=np.float32).argsort(1)
        masks.append(order < erased)  # in a random permutation as many places as are to be erased have a lesser number
    mask = torch.from_numpy(np.concatenate(masks)).view(-1, 1, rows, columns).to(images.device)
    return images.masked_fill(mask.repeat_interleave(patch, 2).repeat_interleave(patch, 3), 0)


def noisy_labels(labels: Tensor, share: float, classes: int, draw: np.random.Generator) -> Tensor:
    """Labels (n,) of which a share, rounded to whole labels, is replaced by another class, all others being as likely."""
    replaced = draw.permutation(len(labels))[: round(share * len(labels))]
    moved = torch.from_numpy(draw.integers(1, classes, size=len(replaced))).to(labels)
    result, which = labels.clone(), torch.from_numpy(replaced).to(labels.device)
    result[which] = (labels[which] + moved) % classes
    return result
