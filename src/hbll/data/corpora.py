"""Texts that language models are trained on, in their published files, and their tokens, encoded once and then mapped.

The tokens lie beside the text, in a folder for each vocabulary (`novels/bytepairs-4096-1f0c9d3e/`): an array of
each part and the vocabulary, which is that of the part to train on. The last part of the name is of the text's sum. What is
kept has checksums, and is made anew where it is damaged.
"""

import hashlib
import itertools
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hbll.data.location import data_folder
from hbll.data.splits import Samples, Splits
from hbll.data.vocabulary import BytePairs, Characters, TokenKind, Vocabulary, Words, load_vocabulary
from hbll.files import file_sum
from hbll.losses import IGNORED

__all__ = ["CORPORA", "Corpus", "Encoded", "encoded"]

PARTS = ("train", "valid", "test")

KEPT = (*(f"{part}.npy" for part in PARTS), "units.json", "vocabulary.json")
"""The files that tokens are kept in, beside `SUMS`, which has their checksums."""

SUMS = "sums.json"

HUB_NAME = "Salesforce/wikitext"

LINES = 20_000
"""Lines that are encoded at once: bounds the memory, changes no result."""


@dataclass(frozen=True)
class Corpus:
    """A text in three parts, a file each, and how its files are told from damaged ones.

    By their SHA-256; of WikiText, whose sums were not published, by the number of tokens that was: words, and the end of
    every line; and by their length where it is known.
    """

    name: str
    """Of its folder, and what the command line calls it."""

    title: str

    files: str
    """Their names, `{}` being the part."""

    sizes: Mapping[TokenKind, int]
    """Different tokens where they are known: words, characters."""

    sums: Mapping[str, str] | None = None
    tokens: Mapping[str, int] | None = None
    lengths: Mapping[str, int] | None = None
    """In bytes."""

    hub: str | None = None
    """Its name in the hub's `HUB_NAME`, from which it is downloaded if the library `datasets` is there."""

    instead: str = ""
    """What may be done without it."""

    def paths(self, data_dir: Path | None = None) -> dict[str, Path]:
        """The files of all parts, downloaded if none is there and it can be; ValueError, naming the first one missing."""
        folder = data_folder(data_dir) / self.name
        paths = {part: folder / self.files.format(part) for part in PARTS}
        if self.hub and not any(file.is_file() for file in paths.values()):
            self._download(self.hub, paths)
        for file in paths.values():
            if not file.is_file():
                raise ValueError(
                    f"the data file {file} of {self.title} is missing: put the published file there, or name the folder "
                    f"that holds {self.name}/ by --data-dir or HBLL_DATA"
                    + (", or `pip install datasets` to download it" if self.hub else "")
                    + self.instead
                )
        return paths

    def check(self, data_dir: Path | None = None) -> None:
        """ValueError, naming the file, unless all parts are there and whole."""
        for part, file in self.paths(data_dir).items():
            if self.sums and (found := file_sum(file)) != self.sums[part]:
                raise ValueError(
                    f"the data file {file} is damaged: its sha256 is {found} and should be {self.sums[part]}"
                )
            if self.lengths and (length := file.stat().st_size) != self.lengths[part]:
                raise ValueError(
                    f"the data file {file} is damaged, or that of another part or set: it has {length:,} bytes and should "
                    f"have {self.lengths[part]:,}"
                )
            if self.tokens and (count := _count(file, line_ends=True)) != self.tokens[part]:
                raise ValueError(
                    f"the data file {file} is damaged, or that of another part or set: it has {count:,} tokens and should "
                    f"have {self.tokens[part]:,}"
                )

    def _download(self, name: str, paths: Mapping[str, Path]) -> None:
        """Lays down what the hub has, as the published files have it; nothing without the library."""
        try:
            import datasets  # pyrefly: ignore[missing-import] - not required: it only helps where there is a network
        except ImportError:
            return
        for part, file in paths.items():
            try:
                rows = datasets.load_dataset(HUB_NAME, name, split="validation" if part == "valid" else part)
            except Exception as error:  # the libraries below it have no common class for "no network"
                raise ValueError(
                    f"{self.title} is not in {file.parent} and could not be downloaded: {error}{self.instead}"
                ) from error
            file.parent.mkdir(parents=True, exist_ok=True)
            unfinished = file.with_name(f"{file.name}.unfinished")
            with unfinished.open("w", encoding="utf-8", newline="\n") as lines:
                lines.writelines(row or " \n" for row in rows["text"])  # the hub has nothing for an empty line
            unfinished.replace(file)

    def units(self, file: Path) -> dict[str, int]:
        """What a part amounts to in words (where line ends are published as tokens, with them) and in bytes."""
        return {"words": _count(file, line_ends=self.tokens is not None), "bytes": file.stat().st_size}


CORPORA: Mapping[str, Corpus] = {
    corpus.name: corpus
    for corpus in (
        Corpus(
            name="novels",
            title="the hundred novels",
            files="novels.{}.txt",
            sums={
                "train": "59a15b6eed3a2cd55734b63a50666673033f92bfd198cda3e1b0c1cff4c48a9e",
                "valid": "33f44ed77f38c0f2dec6a5f591f2326aa4c79369548d28b48a86f50b95923939",
                "test": "f1ec18c2168b3d6b21bd7c9d96c8b43000a37df242121a1662cc10d7daf32d13",
            },
            sizes={"characters": 252},
        ),
        Corpus(
            name="wikitext-2",
            title="WikiText-2",
            files="wiki.{}.tokens",
            hub="wikitext-2-v1",
            tokens={"train": 2_088_628, "valid": 217_646, "test": 245_569},
            lengths={"train": 10_797_148, "valid": 1_121_681, "test": 1_256_449},
            sizes={"words": 33_278, "characters": 283},
        ),
        Corpus(
            name="wikitext-103",
            title="WikiText-103",
            files="wiki.{}.tokens",
            hub="wikitext-103-v1",
            tokens={"train": 103_227_021, "valid": 217_646, "test": 245_569},
            sizes={"words": 267_735},
            instead="; or take the hundred novels in its place: the recipe novels-gpt, or --corpus novels to reproduce",
        ),
    )
}


@dataclass(frozen=True)
class Encoded:
    """A corpus in tokens."""

    vocabulary: Vocabulary

    tokens: Mapping[str, np.ndarray]
    """Of each part, (n,) int64, mapped from its file."""

    units: Mapping[str, Mapping[str, int]]
    """Of each part, in words and bytes."""

    def splits(self, context: int) -> Splits:
        """Sequences of that many tokens that do not overlap, each token to be predicted from those before it.

        Of the text to train on, what does not fill a sequence at its end is left out, and sequences are views of the mapped
        file. Of the others every token is a label once: the first follows `vocabulary.start`, and labels after the last
        are ignored.

        Raises:
            ValueError: a part is too short for a sequence.
        """
        train = self.tokens["train"]
        count = (len(train) - 1) // context
        if count < 1:
            raise ValueError(f"a text of {len(train)} tokens is too short for sequences of {context}")
        tokens = torch.from_numpy(train)
        inputs, labels = (tokens[first : first + count * context].view(count, context) for first in (0, 1))
        valid, test = (self._whole(part, context) for part in ("valid", "test"))
        return Splits(Samples(inputs, labels), test, valid)

    def _whole(self, part: str, context: int) -> Samples:
        tokens = torch.from_numpy(self.tokens[part])
        missing = -len(tokens) % context
        inputs = torch.cat([torch.tensor([self.vocabulary.start]), tokens[:-1], tokens.new_zeros(missing)])
        labels = torch.cat([tokens, tokens.new_full((missing,), IGNORED)])
        return Samples(inputs.view(-1, context), labels.view(-1, context), self.units[part])


def encoded(corpus: Corpus, kind: TokenKind, size: int | None = None, data_dir: Path | None = None) -> Encoded:
    """A corpus in tokens, which are made and kept beside it the first time.

    Args:
        corpus: the text.
        kind: `bytepairs` trained on it; `words` as published; or its `characters`.
        size: of the vocabulary of byte pairs.
        data_dir: the folder that holds the corpus (None: $HBLL_DATA, else ~/.cache/hbll).

    Raises:
        ValueError: the text is missing or damaged; the message names the file.
    """
    files = corpus.paths(data_dir)
    digest = hashlib.sha256("".join(map(file_sum, files.values())).encode()).hexdigest()[:8]
    name = "-".join([kind, *([str(size)] if kind == "bytepairs" else []), digest])
    folder = data_folder(data_dir) / corpus.name / name
    if not _is_whole(folder):
        corpus.check(data_dir)
        _encode(corpus, kind, size, files, folder)
    units = json.loads((folder / "units.json").read_text())
    # Mapped for copying on write, because torch warns of arrays that cannot be written to; nothing writes to them.
    tokens = {part: np.load(folder / f"{part}.npy", mmap_mode="c") for part in PARTS}
    return Encoded(load_vocabulary(folder / "vocabulary.json"), tokens, units)


def _encode(corpus: Corpus, kind: TokenKind, size: int | None, files: Mapping[str, Path], folder: Path) -> None:
    """Makes the folder, in place of a damaged one: it is there whole or not at all."""
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.unfinished-", dir=folder.parent) as workspace:
        made, damaged = Path(workspace, "made"), Path(workspace, "damaged")
        made.mkdir()
        vocabulary = _vocabulary(kind, size, files)
        (made / "vocabulary.json").write_text(vocabulary.json())
        for part, file in files.items():
            tokens = np.concatenate([np.array(vocabulary.encode(text), dtype=np.int64) for text in _texts(file)])
            np.save(made / f"{part}.npy", tokens)
        units = {part: corpus.units(file) for part, file in files.items()}
        (made / "units.json").write_text(json.dumps(units) + "\n")
        (made / SUMS).write_text(json.dumps(_sums(made)) + "\n")
        try:
            if folder.is_dir() and not _is_whole(folder):
                folder.rename(damaged)
            made.rename(folder)
        except OSError:
            if not _is_whole(folder):  # another process was faster otherwise, and made the same
                raise


def _is_whole(folder: Path) -> bool:
    """Whether tokens are kept there, as they were written."""
    try:
        return json.loads((folder / SUMS).read_bytes()) == _sums(folder)
    except (OSError, ValueError):
        return False


def _sums(folder: Path) -> dict[str, str]:
    return {name: file_sum(folder / name) for name in KEPT}


def _vocabulary(kind: TokenKind, size: int | None, files: Mapping[str, Path]) -> Vocabulary:
    if kind == "characters":  # of all parts: an alphabet tells nothing of what is in a text
        return Characters.of(text for file in files.values() for text in _texts(file))
    if kind == "words":
        return Words.of(_texts(files["train"]))
    assert size is not None
    return BytePairs.of(_texts(files["train"]), size)


def _texts(file: Path) -> Iterator[str]:
    """A text, so many lines at a time."""
    try:
        with file.open(encoding="utf-8", newline="\n") as lines:
            while part := "".join(itertools.islice(lines, LINES)):
                yield part
    except UnicodeDecodeError as error:
        raise ValueError(f"the data file {file} is damaged: it is no text in UTF-8 ({error})") from error


def _count(file: Path, line_ends: bool) -> int:
    """Words between spaces."""
    with file.open("rb") as lines:
        return sum(len(line.split()) + line_ends for line in lines)
