"""Texts as numbers, and back: characters, words, or byte pairs, each a vocabulary that can be kept in a file."""

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np

__all__ = ["BytePairs", "Characters", "TokenKind", "Vocabulary", "Words", "load_vocabulary"]

TokenKind: TypeAlias = Literal["bytepairs", "words", "characters"]

END_OF_LINE = "<eos>"
UNKNOWN = "<unk>"
START = "<|endoftext|>"


class Vocabulary(ABC):
    """The tokens of a text by their numbers, from 0."""

    kind: ClassVar[TokenKind]

    start: int
    """The token that stands before the first one of a text."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The numbers of the tokens of a text; of a long one the lines may be encoded one after the other.

        Raises:
            ValueError: the text holds what the vocabulary has no token for.
        """

    @abstractmethod
    def decode(self, tokens: Iterable[int]) -> str:
        """The text that tokens stand for."""

    @abstractmethod
    def content(self) -> Any:
        """What it is made of, for JSON."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and (self.kind, self.content()) == (other.kind, other.content())

    def json(self) -> str:
        """The file that `load_vocabulary` reads."""
        return json.dumps({"kind": self.kind, "content": self.content()}) + "\n"


class Characters(Vocabulary):
    """Every character a token, numbered in the order of an alphabet; a text starts after a new line.

    ValueError for an alphabet that is empty, or whose characters are not sorted, each once.
    """

    kind = "characters"

    def __init__(self, alphabet: str) -> None:
        if not alphabet or list(alphabet) != sorted(set(alphabet)):
            raise ValueError(f"an alphabet has its characters sorted, each once, and one at least; got {alphabet!r}")
        self.alphabet = alphabet
        self.codes = _code_points(alphabet)
        self.start = max(alphabet.find("\n"), 0)

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Characters":
        """All characters of some texts, sorted."""
        return cls("".join(sorted(set().union(*texts))))

    def __len__(self) -> int:
        return len(self.alphabet)

    def encode(self, text: str) -> list[int]:
        points = _code_points(text)
        numbers = np.searchsorted(self.codes, points)
        known = self.codes[numbers.clip(max=len(self) - 1)] == points
        if not known.all():
            unknown = sorted(set(text) - set(self.alphabet))
            raise ValueError(f"the vocabulary has no {', '.join(map(repr, unknown))}: write the text without")
        return numbers.tolist()

    def decode(self, tokens: Iterable[int]) -> str:
        return "".join(self.alphabet[token] for token in tokens)

    def content(self) -> str:
        return self.alphabet


class Words(Vocabulary):
    """Every word between spaces a token, and the end of every line one more; words that it has not are `<unk>`."""

    kind = "words"

    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)
        self.numbers = {word: number for number, word in enumerate(words)}
        self.start = self.numbers[END_OF_LINE]

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Words":
        """The words of some texts, the most frequent first, equally frequent ones in their order."""
        counts = Counter({UNKNOWN: 0})
        for text in texts:
            counts.update(_words(text))
        return cls(sorted(counts, key=lambda word: (-counts[word], word)))

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        unknown = self.numbers[UNKNOWN]
        return [self.numbers.get(word, unknown) for word in _words(text)]

    def decode(self, tokens: Iterable[int]) -> str:
        text = " ".join(["", *(self.words[token] for token in tokens), ""])  # a line as published: " word word \n"
        return text.replace(END_OF_LINE, "\n").removesuffix(" ")

    def content(self) -> list[str]:
        return self.words


class BytePairs(Vocabulary):
    """Byte pairs as of GPT-2 (Sennrich et al. 2016; Radford et al. 2019), by the library `tokenizers`; lossless."""

    kind = "bytepairs"

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.start = tokenizer.token_to_id(START)

    @classmethod
    def of(cls, texts: Iterable[str], size: int) -> "BytePairs":
        """A vocabulary of at most that many tokens, trained on some texts."""
        tokenizers = _library()
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=[START],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator((line for text in texts for line in _lines(text)), trainer)
        return cls(tokenizer)

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        encoded = self.tokenizer.encode_batch(_lines(text), add_special_tokens=False)
        return [token for line in encoded for token in line.ids]

    def decode(self, tokens: Iterable[int]) -> str:
        return self.tokenizer.decode(list(tokens))

    def content(self) -> dict[str, Any]:
        return json.loads(self.tokenizer.to_str())


def load_vocabulary(file: Path) -> Vocabulary:
    """The vocabulary whose `json` a file holds.

    Raises:
        ValueError: there is no such file, or it holds no vocabulary.
    """
    damaged = f"{file} holds no vocabulary, or a damaged one"
    try:
        stored = json.loads(file.read_bytes())
        kind, content = stored["kind"], stored["content"]
    except OSError as error:
        raise ValueError(f"there is no vocabulary {file}") from error
    except (ValueError, KeyError, TypeError) as error:  # neither JSON nor, maybe, text
        raise ValueError(damaged) from error
    tokenizers = _library() if kind == "bytepairs" else None
    try:
        if tokenizers:
            return BytePairs(tokenizers.Tokenizer.from_str(json.dumps(content)))
        return {"characters": Characters, "words": Words}[kind](content)
    except Exception as error:  # tokenizers has no class of its own for what it cannot read
        raise ValueError(damaged) from error


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def _lines(text: str) -> list[str]:
    """The lines of a text with their ends; together they are the text."""
    *whole, last = text.split("\n")
    return [line + "\n" for line in whole] + ([last] if last else [])


def _words(text: str) -> list[str]:
    return [word for line in _lines(text) for word in (*line.split(), *([END_OF_LINE] if line.endswith("\n") else []))]


def _library() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ValueError('byte pairs need the library tokenizers: pip install "hbll[data]"') from None
    return tokenizers
