"""Tiny Shakespeare (Karpathy 2015): about a million characters of plays, and sequences of characters cut from a text."""

import hashlib
from pathlib import Path

import torch

from hbll.data.location import data_folder
from hbll.data.splits import Samples, Splits
from hbll.data.vocabulary import Characters

SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
"""Of the published input.txt."""

CHARACTERS = 65
"""Different ones in the published text."""

TEST_SHARE = 10
"""One character in so many, the last ones, is for testing."""


def tiny_shakespeare(data_dir: Path | None = None) -> str:
    """The whole text: 1,115,394 characters, 65 different ones.

    Read from `tinyshakespeare/input.txt` under `data_dir` (None: $HBLL_DATA, else ~/.cache/hbll). ValueError, naming the
    file, when it is missing or damaged.
    """
    file = data_folder(data_dir) / "tinyshakespeare" / "input.txt"
    if not file.is_file():
        raise ValueError(
            f"the text {file} is missing (sha256 {SHA256}): put it there, "
            "or name the folder that holds tinyshakespeare/ by --data-dir or HBLL_DATA"
        )
    content = file.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise ValueError(f"the data file {file} is damaged: its sha256 is {found} and should be {SHA256}")
    return content.decode()


def next_characters(text: str, length: int) -> Splits:
    """The text in sequences that do not overlap, each character to be predicted from those before it.

    Characters are numbered in their order among the sorted different ones of the whole text.

    Args:
        text: what to cut.
        length: N, characters of a sequence.

    Returns:
        Inputs (n, N) and labels (n, N), the characters that follow; the last tenth of the text is for testing.

    Raises:
        ValueError: the text is too short for a sequence to train and one to test on.
    """
    codes = torch.tensor(Characters.of([text]).encode(text))
    border = len(codes) - len(codes) // TEST_SHARE
    if min(border, len(codes) - border) <= length:
        raise ValueError(f"a text of {len(text)} characters is too short for sequences of {length}")
    return Splits(_sequences(codes[:border], length), _sequences(codes[border:], length))


def _sequences(codes: torch.Tensor, length: int) -> Samples:
    count = (len(codes) - 1) // length
    inputs, labels = codes[: count * length], codes[1 : count * length + 1]
    return Samples(inputs.view(count, length), labels.view(count, length))
