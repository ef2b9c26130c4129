"""A character language model of transformer blocks."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from hbll.data import Splits
from hbll.data.text import CHARACTERS, Characters, next_characters, tiny_shakespeare
from hbll.models.gpt import GPTBlock, GPTEmbed, GPTHead
from hbll.network import Chain
from hbll.recipes.base import ChainRecipe, Schedule
from hbll.recipes.measures import CHARACTER_MEASURES, Measure


@dataclass(frozen=True, kw_only=True)
class ShakespeareGpt(ChainRecipe):
    """Causal transformer blocks on tiny Shakespeare, character by character."""

    name: ClassVar[str] = "shakespeare-gpt"
    methods: ClassVar[tuple[str, ...]] = ("stream", "scan", "paper", "bp")
    measures: ClassVar[tuple[Measure, ...]] = CHARACTER_MEASURES

    width: int = 64
    """Features of every character of a state; an attention head for each 64 of them, but two at least."""

    context: int = 128
    """Characters of a sequence."""

    epochs: int = 20
    """Passes over the training samples."""

    learning_rate: float = 4e-3
    """The optimizer's, at its highest."""

    schedule: Schedule = "cosine"
    """How the learning rate goes on over the steps: as it is, down to 0 in a straight line, or along a cosine."""

    gradient_clip: float | None = 1.0
    """Norm that the gradients of the network, and those of the rule's own weights, are each cut down to."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.context < 1:
            raise ValueError(f"--context must be at least 1, not {self.context}")
        if self.width % self.heads:
            raise ValueError(f"--width must be a multiple of its {self.heads} attention heads, not {self.width}")

    @property
    def heads(self) -> int:
        """Attention heads of a block."""
        return max(2, self.width // 64)

    def load(self, data_dir: Path | None) -> Splits:
        return next_characters(tiny_shakespeare(data_dir), self.context)

    def tokenizer(self, data_dir: Path | None) -> Characters:
        return Characters(tiny_shakespeare(data_dir))

    def network(self) -> Chain:
        return Chain(
            embed=GPTEmbed(CHARACTERS, self.context, self.width),
            blocks=[GPTBlock(self.width, self.heads, depth=self.block_count) for _ in range(self.block_count)],
            head=GPTHead(CHARACTERS, self.width),
        )
