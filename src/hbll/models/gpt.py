"""GPT-2-like language models whose blocks keep the shape of their state: embed, causal transformer blocks, head.

Pre-norm blocks as in GPT-2 (Radford et al. 2019); attention through torch's fused kernel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["GPTBlock", "GPTEmbed", "GPTHead"]


class GPTEmbed(nn.Module):
    """Token and position embeddings, (B, T) integers -> (B, T, width); T at most ``context``."""

    def __init__(self, vocabulary: int, context: int, width: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))


class GPTBlock(nn.Module):
    """Causal self-attention and a perceptron of four times the width, each with a norm before and a skip around it.

    Args:
        width: features of the state (B, T, width).
        heads: attention heads; they divide the width.
        dropout: share of features dropped at the end of either part.
        depth: blocks of the network; what either part adds to the state starts the smaller the more there are (GPT-2's
            initialisation).
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0, depth: int = 1) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.perceptron_norm = nn.LayerNorm(width)
        self.perceptron_in = nn.Linear(width, 4 * width)
        self.perceptron_out = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)
        added = (self.attention_out, self.perceptron_out)
        for linear in (self.query_key_value, self.perceptron_in, *added):
            nn.init.normal_(linear.weight, std=0.02 / (2 * depth) ** 0.5 if linear in added else 0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, state: Tensor) -> Tensor:
        state = state + self.dropout(self._attend(self.attention_norm(state)))
        inner = F.gelu(self.perceptron_in(self.perceptron_norm(state)))
        return state + self.dropout(self.perceptron_out(inner))

    def _attend(self, state: Tensor) -> Tensor:
        batch, tokens, width = state.shape
        split = self.query_key_value(state).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.attention_out(mixed.transpose(1, 2).reshape(batch, tokens, width))


class GPTHead(nn.Module):
    """Norm and linear map to the logits of the next token, (B, T, width) -> (B, T, vocabulary)."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.predict = nn.Linear(width, vocabulary)

    def forward(self, state: Tensor) -> Tensor:
        return self.predict(self.norm(state))
