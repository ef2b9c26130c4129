"""MNIST from its four published idx files, or from the hub's copy of them.

The published files are gzipped; a download through `datasets` lays down the same idx files unpacked. Both are
checked whole against the md5 of the published ones before a sample is used.
"""

import gzip
import hashlib
from pathlib import Path

import numpy as np
import torch

from hbll.data import idx
from hbll.data.location import data_folder
from hbll.data.splits import Samples, Splits

HUB_NAME = "ylecun/mnist"

PACKED_MD5 = {
    "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c",
}
"""Of the published files, NAME.gz."""

UNPACKED_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
"""Of what the published files hold."""


def mnist(data_dir: Path | None = None) -> Splits:
    """60,000 samples to train on and 10,000 to test on: inputs (n, 784) in [0, 1], labels of 10 classes.

    Read from `mnist/` under `data_dir` (None: $HBLL_DATA, else ~/.cache/hbll), downloaded through `datasets` where it
    is missing. ValueError, naming the file, for a missing or damaged one.
    """
    folder = data_folder(data_dir) / "mnist"
    if not any(folder.glob("*-ubyte*")):
        _download(folder)
    return Splits(_samples(folder, "train"), _samples(folder, "t10k"))


def _samples(folder: Path, part: str) -> Samples:
    images = idx.decode(_read(folder, f"{part}-images-idx3-ubyte"))
    labels = idx.decode(_read(folder, f"{part}-labels-idx1-ubyte"))
    inputs = torch.from_numpy(images.reshape(len(images), -1).astype(np.float32) / 255)
    return Samples(inputs, torch.from_numpy(labels.astype(np.int64)))


def _read(folder: Path, name: str) -> bytes:
    packed, unpacked = folder / f"{name}.gz", folder / name
    if packed.is_file():
        return gzip.decompress(_checked(packed, packed.read_bytes(), PACKED_MD5[name]))
    if unpacked.is_file():
        return _checked(unpacked, unpacked.read_bytes(), UNPACKED_MD5[name])
    raise ValueError(
        f"MNIST's file {packed} is missing (md5 {PACKED_MD5[name]}): put it there, "
        "or name the folder that holds mnist/ by --data-dir or HBLL_DATA"
    )


def _checked(file: Path, content: bytes, expected: str) -> bytes:
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != expected:
        raise ValueError(f"the data file {file} is damaged: its md5 is {found} and should be {expected}")
    return content


def _download(folder: Path) -> None:
    try:
        import datasets  # pyrefly: ignore[missing-import] - not required: it only helps where there is a network
    except ImportError:
        raise ValueError(
            f"MNIST is not under {folder}: put its four published files (train-images-idx3-ubyte.gz, ...) there, name "
            "the folder that holds mnist/ by --data-dir or HBLL_DATA, or `pip install datasets` to download it"
        ) from None
    contents = {}
    for part, split in (("train", "train"), ("t10k", "test")):
        try:
            rows = datasets.load_dataset(HUB_NAME, split=split)
        except Exception as error:  # the libraries below it have no common class for "no network"
            raise ValueError(f"MNIST is not under {folder} and could not be downloaded: {error}") from error
        images = np.stack([np.asarray(image) for image in rows["image"]])
        contents[f"{part}-images-idx3-ubyte"] = idx.encode(images.astype(np.uint8))
        contents[f"{part}-labels-idx1-ubyte"] = idx.encode(np.asarray(rows["label"], dtype=np.uint8))
    for name, content in contents.items():
        _checked(folder / name, content, UNPACKED_MD5[name])
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
