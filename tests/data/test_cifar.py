"""CIFAR's files. Synthetic ones pass for the published; the real ones are read where HBLL_DATA has them."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from hbll.data import cifar
from hbll.data.cifar import CIFAR10_SHA1, CIFAR100_SHA1, cifar10, cifar100

FOLDERS = {"cifar10": "cifar-10-batches-bin", "cifar100": "cifar-100-binary"}


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Small files in the published layout, whose sums pass for the published ones, and what they hold."""
    draw = np.random.default_rng(0)
    held = {}
    for folder, sums, count, labels in [("cifar10", CIFAR10_SHA1, 2, 1), ("cifar100", CIFAR100_SHA1, 3, 2)]:
        (tmp_path / FOLDERS[folder]).mkdir()
        for name in list(sums):
            records = draw.integers(0, 256, (count, labels + 3072), np.uint8)
            records[:, :labels] %= 10
            content = records.tobytes()
            (tmp_path / FOLDERS[folder] / name).write_bytes(content)
            monkeypatch.setitem(sums, name, hashlib.sha1(content, usedforsecurity=False).hexdigest())
            held[name] = records
    return tmp_path, held


def check(samples, records, labels, statistics):
    assert len(samples) == len(records)
    assert samples.inputs.shape == (len(records), 3, 32, 32)
    assert samples.inputs.dtype == torch.float32
    assert samples.labels.dtype == torch.int64
    assert samples.labels.tolist() == records[:, labels - 1].tolist()
    for (mean, deviation), channel in zip(zip(*statistics, strict=True), range(3), strict=True):
        for row, column in [(0, 0), (0, 31), (31, 0), (17, 5)]:
            # 1,024 bytes of red, then green, then blue; each row by row.
            pixel = records[:, labels + 1024 * channel + 32 * row + column].astype(np.float64)
            expected = (pixel / 255 - mean) / deviation
            np.testing.assert_allclose(samples.inputs[:, channel, row, column].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_cifar10(published):
    folder, held = published
    splits = cifar10(folder)
    train = np.concatenate([held[f"data_batch_{i}.bin"] for i in range(1, 6)])
    check(splits.train, train, 1, cifar.CIFAR10_STATISTICS)
    check(splits.test, held["test_batch.bin"], 1, cifar.CIFAR10_STATISTICS)


def test_cifar100_has_the_fine_labels(published):
    folder, held = published
    splits = cifar100(folder)
    check(splits.train, held["train.bin"], 2, cifar.CIFAR100_STATISTICS)
    check(splits.test, held["test.bin"], 2, cifar.CIFAR100_STATISTICS)
    assert splits.train.labels.tolist() != held["train.bin"][:, 0].tolist()


def test_the_environment_names_the_folder(published, monkeypatch):
    folder, held = published
    monkeypatch.setenv("HBLL_DATA", str(folder))
    assert cifar10().test.labels.tolist() == held["test_batch.bin"][:, 0].tolist()


@pytest.mark.parametrize(
    ("read", "name"), [(cifar10, "data_batch_3.bin"), (cifar10, "test_batch.bin"), (cifar100, "test.bin")]
)
def test_a_missing_file_is_named(published, read, name):
    folder, _ = published
    file = folder / FOLDERS[read.__name__] / name
    file.unlink()
    with pytest.raises(ValueError, match=r"missing .* unpack the binary version") as error:
        read(folder)
    assert str(file) in str(error.value)


@pytest.mark.parametrize(("read", "name"), [(cifar10, "data_batch_5.bin"), (cifar100, "train.bin")])
def test_a_damaged_file_is_named_with_both_sums(published, read, name):
    folder, _ = published
    file = folder / FOLDERS[read.__name__] / name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="damaged") as error:
        read(folder)
    sums = CIFAR10_SHA1 if read is cifar10 else CIFAR100_SHA1
    for part in (str(file), sums[name], hashlib.sha1(content, usedforsecurity=False).hexdigest()):
        assert part in str(error.value)


def test_the_published_files():
    folder = os.environ.get("HBLL_DATA")
    if folder is None or not (Path(folder) / FOLDERS["cifar10"]).is_dir():
        pytest.skip("HBLL_DATA names no folder that holds cifar-10-batches-bin/")
    splits = cifar10(Path(folder))
    assert splits.train.labels.bincount().tolist() == [5000] * 10
    assert splits.test.labels.bincount().tolist() == [1000] * 10
    assert splits.train.inputs.mean((0, 2, 3)).abs().max() < 1e-3
    assert (splits.train.inputs.std((0, 2, 3)) - 1).abs().max() < 1e-2
