"""GPT-2-like language models whose blocks keep the shape of their state: embed, causal transformer blocks, head.

Pre-norm blocks as in GPT-2 (Radford et al. 2019); attention through torch's fused kernel; positions learnt, or rotary (Su et
al., arXiv 2104.09864). To go on with a sequence, hand over where its new tokens start and a cache for each block:

    caches = [KeyValueCache() for _ in blocks]
    state = embed(tokens)                       # then embed(more, start=tokens.shape[1]), and so on
    for block, cache in zip(blocks, caches):
        state = block(state, cache=cache.rewound())
"""

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["GPTBlock", "GPTEmbed", "GPTHead", "KeyValueCache"]


class KeyValueCache:
    """The keys and values of the tokens that have passed a module, for those that come after.

    A module with several attentions has a place for each, in the order in which it evaluates them.
    """

    def __init__(self) -> None:
        self._places: list[tuple[Tensor, Tensor]] = []
        self._next = 0

    def rewound(self) -> Self:
        """The cache, ready for the first attention of the module again."""
        self._next = 0
        return self

    def extended(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of an attention, (B, heads, tokens, F) each, once those of new tokens are added."""
        if self._next == len(self._places):
            self._places.append((key, value))
        else:
            keys, values = self._places[self._next]
            self._places[self._next] = torch.cat([keys, key], 2), torch.cat([values, value], 2)
        self._next += 1
        return self._places[self._next - 1]

    def cut(self, length: int) -> None:
        """Forgets all tokens but the first ``length``."""
        self._places = [(key[:, :, :length], value[:, :, :length]) for key, value in self._places]


class GPTEmbed(nn.Module):
    """Token embeddings with their positions, (B, T) integers -> (B, T, width).

    Args:
        vocabulary: how many tokens there are.
        context: positions that there are; longer sequences are refused.
        width: features of the state.
        rotary: size of an attention head, even, if positions are rotary: not learnt and added to tokens, but handed to all
            blocks as the context's entry ``rotary``, angles (T, rotary / 2) by which keys and queries are turned.
    """

    def __init__(self, vocabulary: int, context: int, width: int, rotary: int | None = None) -> None:
        super().__init__()
        if rotary is not None and (rotary < 2 or rotary % 2):
            raise ValueError(f"rotary positions turn pairs of features: heads of an even size, not of {rotary}")
        self.vocabulary = vocabulary
        self.context = context
        self.rotary = rotary
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width) if rotary is None else None
        for embedding in filter(None, (self.token, self.position)):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor, start: int = 0) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The state, with a context if positions are rotary; ``start`` is the position of the first of the tokens.

        Raises:
            ValueError: they go on beyond ``context``.
        """
        end = start + tokens.shape[1]
        if end > self.context:
            raise ValueError(
                f"a sequence of {end} tokens is longer than the {self.context} that the network is made for"
            )
        positions = torch.arange(start, end, device=tokens.device)
        state = self.token(tokens)
        if self.rotary is None:
            assert self.position is not None
            return state + self.position(positions)
        rates = 10000.0 ** (-torch.arange(0, self.rotary, 2, device=tokens.device) / self.rotary)
        return state, {"rotary": torch.outer(positions, rates).to(state.dtype)}


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
        if width % heads:
            raise ValueError(f"a width of {width} cannot be divided among {heads} attention heads")
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

    def forward(self, state: Tensor, rotary: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        """The state (B, T, width) of tokens that see those before them, and all tokens that the cache has of earlier calls.

        Args:
            rotary: the angles of rotary positions, as ``GPTEmbed`` has them.
            cache: takes up the keys and values of these tokens.
        """
        state = state + self.dropout(self._attend(self.attention_norm(state), rotary, cache))
        inner = F.gelu(self.perceptron_in(self.perceptron_norm(state)))
        return state + self.dropout(self.perceptron_out(inner))

    def _attend(self, state: Tensor, rotary: Tensor | None, cache: KeyValueCache | None) -> Tensor:
        batch, tokens, width = state.shape
        split = self.query_key_value(state).view(batch, tokens, 3, self.heads, width // self.heads)
        split = split.permute(2, 0, 3, 1, 4)
        query, key, value = split
        if rotary is not None:
            query, key = turned(split[:2], rotary)
        if cache is not None:
            key, value = cache.extended(key, value)
        if (before := key.shape[2] - tokens) == 0:
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            seen = None  # by one token, all that are there
            if tokens > 1:
                seen = torch.ones(tokens, key.shape[2], dtype=torch.bool, device=state.device).tril(before)
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        return self.attention_out(mixed.transpose(1, 2).reshape(batch, tokens, width))


def turned(features: Tensor, angles: Tensor) -> Tensor:
    """Features (..., T, F), each pair (i, i + F/2) of which is turned by an angle of its own, (T, F/2)."""
    cosine, sine = angles.cos().to(features.dtype), angles.sin().to(features.dtype)
    first, second = features.chunk(2, -1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)


class GPTHead(nn.Module):
    """Norm and linear map to the logits of the next token, (B, T, width) -> (B, T, vocabulary)."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.predict = nn.Linear(width, vocabulary)

    def forward(self, state: Tensor) -> Tensor:
        return self.predict(self.norm(state))
