"""What recipes of transformer language models have in common."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from hbll.models.gpt import GPTBlock, GPTEmbed, GPTHead
from hbll.network import Chain
from hbll.recipes.base import ChainRecipe, Schedule


@dataclass(frozen=True, kw_only=True)
class GptRecipe(ChainRecipe):
    """The network, and how it is trained."""

    methods: ClassVar[tuple[str, ...]] = ("stream", "scan", "paper", "bp")

    width: int = 64
    """Features of every token of a state; an attention head for each 64 of them, but two at least."""

    context: int = 128
    """Tokens of a sequence."""

    positions: Literal["learnt", "rotary"] = "learnt"
    """How tokens tell where they are: by embeddings that are added, or by turning keys and queries."""

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
        if self._rotary and self._rotary % 2:
            raise ValueError(
                f"--positions rotary turns pairs of features: --width must be a multiple of {2 * self.heads}"
            )

    @property
    def heads(self) -> int:
        """Attention heads of a block."""
        return max(2, self.width // 64)

    @property
    def _rotary(self) -> int | None:
        """Features of a head, where they are turned."""
        return self.width // self.heads if self.positions == "rotary" else None

    @property
    @abstractmethod
    def token_count(self) -> int:
        """Different tokens."""

    def network(self) -> Chain:
        return Chain(
            embed=GPTEmbed(self.token_count, self.context, self.width, self._rotary),
            blocks=[GPTBlock(self.width, self.heads, depth=self.block_count) for _ in range(self.block_count)],
            head=GPTHead(self.token_count, self.width),
        )
