"""The features of a state, apart from its pixels or tokens, and how alike those of two samples are."""

import torch.nn.functional as F
from torch import Tensor

__all__ = ["by_pixel", "cosines"]


def by_pixel(state: Tensor) -> Tensor:
    """(B, F, P) of a state of vectors (B, F), tokens (B, P, F) or feature maps (B, F, H, W)."""
    if state.ndim == 2:
        return state.unsqueeze(2)
    return state.flatten(2) if state.ndim == 4 else state.mT


def cosines(rows: Tensor, eps: float = 1e-12) -> Tensor:
    """The cosine between any two rows, (B, B), where norms count as at least ``eps``."""
    unit = F.normalize(rows, eps=eps)
    return unit @ unit.T
