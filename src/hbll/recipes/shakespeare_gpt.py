"""A character language model of transformer blocks."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from hbll.data import Splits
from hbll.data.text import CHARACTERS, next_characters, tiny_shakespeare
from hbll.data.vocabulary import Characters
from hbll.recipes.gpt import GptRecipe
from hbll.recipes.measures import CHARACTER_MEASURES, Measure


@dataclass(frozen=True, kw_only=True)
class ShakespeareGpt(GptRecipe):
    """Causal transformer blocks on tiny Shakespeare, character by character."""

    name: ClassVar[str] = "shakespeare-gpt"
    measures: ClassVar[tuple[Measure, ...]] = CHARACTER_MEASURES

    epochs: int = 20
    """Passes over the training samples."""

    @property
    def token_count(self) -> int:
        return CHARACTERS

    def load(self, data_dir: Path | None) -> Splits:
        return next_characters(tiny_shakespeare(data_dir), self.context)

    def vocabulary(self, data_dir: Path | None) -> Characters:
        return Characters.of([tiny_shakespeare(data_dir)])
