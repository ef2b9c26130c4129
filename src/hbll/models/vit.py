"""Vision transformers for small images (Dosovitskiy et al., arXiv 2010.11929), their output the mean over patches.

Pre-norm blocks that keep the shape of their state; attention through torch's fused kernel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ViTBlock", "ViTEmbed", "ViTHead", "vit"]


class ViTEmbed(nn.Module):
    """Cuts images (B, channels, size, size) into patches, maps each linearly and adds a learnt position: (B, T, width)."""

    def __init__(self, size: int, patch: int, width: int, channels: int = 3) -> None:
        super().__init__()
        if size % patch:
            raise ValueError(f"images of {size} pixels a side cannot be cut into patches of {patch}")
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn((size // patch) ** 2, width))

    def forward(self, images: Tensor) -> Tensor:
        return self.patches(images).flatten(2).mT + self.position


class ViTBlock(nn.Module):
    """Self-attention among all patches and a perceptron, each with a norm before and a skip around it.

    Args:
        width: features of the state (B, T, width).
        heads: attention heads; they divide the width.
        expansion: features inside the perceptron, as a multiple of the width.
    """

    def __init__(self, width: int, heads: int, expansion: int = 2) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"a width of {width} cannot be divided among {heads} attention heads")
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.perceptron_norm = nn.LayerNorm(width)
        self.perceptron_in = nn.Linear(width, expansion * width)
        self.perceptron_out = nn.Linear(expansion * width, width)

    def forward(self, state: Tensor) -> Tensor:
        state = state + self._attend(self.attention_norm(state))
        return state + self.perceptron_out(F.gelu(self.perceptron_in(self.perceptron_norm(state))))

    def _attend(self, state: Tensor) -> Tensor:
        batch, tokens, width = state.shape
        split = self.query_key_value(state).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.attention_out(mixed.transpose(1, 2).reshape(batch, tokens, width))


class ViTHead(nn.Module):
    """Norm, mean over patches, linear map to class logits, (B, T, width) -> (B, classes)."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.classify = nn.Linear(width, classes)

    def forward(self, state: Tensor) -> Tensor:
        return self.classify(self.norm(state).mean(1))


def vit(
    blocks: int = 7,
    width: int = 128,
    heads: int = 4,
    patch: int = 4,
    size: int = 32,
    channels: int = 3,
    classes: int = 10,
) -> list[nn.Module]:
    """The embed, that many blocks, and the head: images (B, channels, size, size) to class logits (B, classes).

    Raises:
        ValueError: the patches do not divide the image, or the heads the width.
    """
    layers = [ViTBlock(width, heads) for _ in range(blocks)]
    return [ViTEmbed(size, patch, width, channels), *layers, ViTHead(width, classes)]
