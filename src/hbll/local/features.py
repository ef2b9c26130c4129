"""The features of a state, apart from its pixels or tokens."""

from torch import Tensor

__all__ = ["by_pixel"]


def by_pixel(state: Tensor) -> Tensor:
    """(B, F, P) of a state of vectors (B, F), tokens (B, P, F) or feature maps (B, F, H, W)."""
    if state.ndim == 2:
        return state.unsqueeze(2)
    return state.flatten(2) if state.ndim == 4 else state.mT
