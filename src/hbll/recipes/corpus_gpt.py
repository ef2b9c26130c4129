"""Transformer language models on long texts: WikiText, and a hundred novels that stand in for the larger one."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from hbll.data import Splits
from hbll.data.corpora import CORPORA, Encoded, encoded
from hbll.data.vocabulary import Vocabulary
from hbll.recipes.base import OptimizerName
from hbll.recipes.gpt import GptRecipe
from hbll.recipes.measures import TEXT_MEASURES, Measure

PAPER = {
    "width": 768,
    "context": 1024,
    "vocabulary_size": 50257,
    "batch_size": 2,
    "optimizer": "adamw",
    "learning_rate": 1e-4,
    "weight_decay": 0.01,
    "epochs": 10,
    "gradient_clip": None,
    "precision": "bfloat16",
    "noise": 0.005,
}
"""What the paper says; of the width and the tokens, which it does not give, and of the schedule, what GPT-2 has."""


@dataclass(frozen=True, kw_only=True)
class CorpusGpt(GptRecipe):
    """A text in three parts, as tokens of one's choice."""

    measures: ClassVar[tuple[Measure, ...]] = TEXT_MEASURES

    preset: Literal["small", "paper"] = "small"
    """What options that are not given are: for minutes on two cores, or the paper's."""

    corpus: str
    """The text, by its folder's name."""

    tokens: Literal["bytepairs", "words", "characters"] = "bytepairs"
    """What the text is cut into: byte pairs trained on it, words as published, or characters."""

    vocabulary_size: int | None = None
    """Different tokens (byte pairs: 4096; else as many as the text has)."""

    batch_size: int = 16
    """Sequences of a step. What an epoch leaves over, fewer than that, waits for the next: rules may keep batches."""

    optimizer: OptimizerName = "muon"
    """What moves the weights: adamw; muon the matrices inside blocks, and adamw the rest at the same rate and decay; or
    nadam with a beta1 of .99, for gradients that come late."""

    def __post_init__(self) -> None:
        super().__post_init__()
        least = 257 if self.tokens == "bytepairs" else 2  # every byte, and the start
        if self.token_count < least:
            raise ValueError(f"--vocabulary-size must be at least {least}, not {self.vocabulary_size}")

    @property
    def token_count(self) -> int:
        sizes = {"bytepairs": 4096, **CORPORA[self.corpus].sizes}
        size = sizes.get(self.tokens) if self.vocabulary_size is None else self.vocabulary_size
        if size is None:
            raise ValueError(f"how many {self.tokens} {self.corpus} has is not known here: give --vocabulary-size")
        return size

    def load(self, data_dir: Path | None) -> Splits:
        return self._encoded(data_dir).splits(self.context)

    def vocabulary(self, data_dir: Path | None) -> Vocabulary:
        return self._encoded(data_dir).vocabulary

    def _encoded(self, data_dir: Path | None) -> Encoded:
        found = encoded(CORPORA[self.corpus], self.tokens, self.token_count, data_dir)
        if len(found.vocabulary) != self.token_count:
            raise ValueError(
                f"{self.corpus} has {len(found.vocabulary)} different {self.tokens}, not {self.token_count}: give "
                f"--vocabulary-size {len(found.vocabulary)}"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class WikitextGpt(CorpusGpt):
    """Causal transformer blocks on WikiText-2 or WikiText-103."""

    name: ClassVar[str] = "wikitext-gpt"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {**PAPER, "corpus": "wikitext-103"}}

    corpus: Literal["wikitext-2", "wikitext-103"] = "wikitext-2"
    """The text."""

    epochs: int = 3
    """Passes over the training samples."""


@dataclass(frozen=True, kw_only=True)
class NovelsGpt(CorpusGpt):
    """Causal transformer blocks on a hundred novels, split by book."""

    name: ClassVar[str] = "novels-gpt"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": PAPER}

    corpus: Literal["novels"] = "novels"
    """The text."""

    tokens: Literal["bytepairs", "characters"] = "bytepairs"
    """What the text is cut into: byte pairs trained on it, or characters."""

    epochs: int = 1
    """Passes over the training samples."""
