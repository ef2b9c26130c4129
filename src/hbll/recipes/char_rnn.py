"""A character language model: what comes next, after every character of a sequence."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from torch import Tensor, nn

from hbll.data import Splits
from hbll.data.text import CHARACTERS, next_characters, tiny_shakespeare
from hbll.recipes.base import Recipe
from hbll.recipes.measures import CHARACTER_MEASURES, Measure
from hbll.recurrent import CELLS, DepthCells, OneHot, RecurrentNetwork, RecurrentRule, make_rule


@dataclass(frozen=True, kw_only=True)
class CharRnn(Recipe):
    """A recurrent network on tiny Shakespeare, character by character, by hbll, paper, bptt, bptt-fused or deer."""

    name: ClassVar[str] = "char-rnn"
    methods: ClassVar[tuple[str, ...]] = ("hbll", "paper", "bptt-fused")
    measures: ClassVar[tuple[Measure, ...]] = CHARACTER_MEASURES

    cell: Literal["gru", "elman", "lstm"] = "gru"
    """The recurrent cell; the Elman cell has a sigmoid."""

    usual_depth: ClassVar[int] = 6

    depth: int | None = None
    """Depth D of the tree: sequences of N = 2^D characters (6 unless --blocks is given)."""

    width: int = 256
    """Units of the hidden state."""

    epochs: int = 10
    """Passes over the training samples."""

    learning_rate: float = 2e-3
    """The optimizer's, at its highest."""

    weight_decay: float = 1e-4
    """The optimizer's."""

    gradient_clip: float | None = 5.0
    """Norm that the gradients of the network, and those of the rule's own weights, are cut down to."""

    @property
    def length(self) -> int:
        """N: characters of a sequence."""
        return self.block_count + 1

    def load(self, data_dir: Path | None) -> Splits:
        return next_characters(tiny_shakespeare(data_dir), self.length)

    def network(self) -> RecurrentNetwork:
        depths = (self.length - 1).bit_length()
        return RecurrentNetwork(
            DepthCells(CELLS[self.cell], CHARACTERS, self.width, depths),
            head=nn.Linear(self.width, CHARACTERS),
            every_step=True,
            embed=OneHot(CHARACTERS),
            length=self.length,
        )

    def rule(self, method: str, network: RecurrentNetwork, example: Tensor) -> RecurrentRule:
        return make_rule(method, network)
