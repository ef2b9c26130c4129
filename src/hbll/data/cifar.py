"""CIFAR-10 and CIFAR-100 from their published binary files (Krizhevsky 2009), checked against the published sums."""

import hashlib
from pathlib import Path

import numpy as np
import torch

from hbll.data.location import data_folder
from hbll.data.splits import Samples, Splits

__all__ = ["cifar10", "cifar100"]

CIFAR10_SHA1 = {
    "data_batch_1.bin": "aadd24acce27caa71bf4b10992e9e7b2d74c2540",
    "data_batch_2.bin": "c0ba65cce70568cd57b4e03e9ac8d2a5367c1795",
    "data_batch_3.bin": "1dd00a74ab1d17a6e7d73e185b69dbf31242f295",
    "data_batch_4.bin": "aab85764eb3584312d3c7f65fd2fd016e36a258e",
    "data_batch_5.bin": "26e2849e66a845b7f1e4614ae70f4889ae604628",
    "test_batch.bin": "67eb016db431130d61cd03c7ad570b013799c88c",
}
CIFAR100_SHA1 = {
    "train.bin": "e207cd2e05b73b1393c74c7f5e7bea451d63e08e",
    "test.bin": "8fb6623e830365ff53cf14adec797474f5478006",
}
# Mean and standard deviation of the training images' channels, of pixels in [0, 1].
CIFAR10_STATISTICS = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CIFAR100_STATISTICS = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)


def cifar10(data_dir: Path | None = None) -> Splits:
    """50,000 samples to train on and 10,000 to test on: inputs (n, 3, 32, 32), standardised by channel, 10 classes.

    Read from ``cifar-10-batches-bin/`` under ``data_dir`` (None: $HBLL_DATA, else ~/.cache/hbll).

    Raises:
        ValueError: a file is missing or damaged; the message names it.
    """
    folder = data_folder(data_dir) / "cifar-10-batches-bin"
    train = [_read(folder / name, sha1) for name, sha1 in CIFAR10_SHA1.items() if name != "test_batch.bin"]
    test = _read(folder / "test_batch.bin", CIFAR10_SHA1["test_batch.bin"])
    return Splits(_samples(b"".join(train), 1, CIFAR10_STATISTICS), _samples(test, 1, CIFAR10_STATISTICS))


def cifar100(data_dir: Path | None = None) -> Splits:
    """As ``cifar10``, with the 100 fine classes, from ``cifar-100-binary/``."""
    folder = data_folder(data_dir) / "cifar-100-binary"
    parts = (_read(folder / name, sha1) for name, sha1 in CIFAR100_SHA1.items())
    train, test = (_samples(part, 2, CIFAR100_STATISTICS) for part in parts)
    return Splits(train, test)


def _read(file: Path, expected: str) -> bytes:
    if not file.is_file():
        raise ValueError(
            f"CIFAR's file {file} is missing (sha1 {expected}): unpack the binary version of the data set there, "
            "or name the folder that holds it by --data-dir or HBLL_DATA"
        )
    content = file.read_bytes()
    found = hashlib.sha1(content, usedforsecurity=False).hexdigest()
    if found != expected:
        raise ValueError(f"the data file {file} is damaged: its sha1 is {found} and should be {expected}")
    return content


def _samples(content: bytes, labels: int, statistics: tuple) -> Samples:
    """Records of ``labels`` bytes of labels, the last of them the finest, and 3,072 of pixels, channel first."""
    records = np.frombuffer(content, np.uint8).reshape(-1, labels + 3072)
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in statistics)
    pixels = torch.from_numpy(records[:, labels:].reshape(-1, 3, 32, 32).astype(np.float32)) / 255
    return Samples((pixels - mean) / deviation, torch.from_numpy(records[:, labels - 1].astype(np.int64)))
