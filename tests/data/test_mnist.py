import gzip
import hashlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from hbll.data import data_folder, idx, mnist
from hbll.data.mnist import PACKED_MD5, UNPACKED_MD5

NAMES = list(PACKED_MD5)


def md5(content):
    return hashlib.md5(content).hexdigest()


@pytest.fixture
def small():
    """Three images to train on and two to test on, as the hub's rows and as the files' contents."""
    draw = np.random.default_rng(0)
    return {
        "train-images-idx3-ubyte": draw.integers(0, 256, (3, 28, 28), np.uint8),
        "train-labels-idx1-ubyte": np.array([7, 0, 9], np.uint8),
        "t10k-images-idx3-ubyte": draw.integers(0, 256, (2, 28, 28), np.uint8),
        "t10k-labels-idx1-ubyte": np.array([4, 4], np.uint8),
    }


@pytest.fixture
def small_is_published(small, monkeypatch):
    """The small arrays pass for the published ones."""
    for name, array in small.items():
        content = idx.encode(array)
        monkeypatch.setitem(PACKED_MD5, name, md5(gzip.compress(content, mtime=0)))
        monkeypatch.setitem(UNPACKED_MD5, name, md5(content))


def lay_down(folder, arrays):
    (folder / "mnist").mkdir()
    for name, array in arrays.items():
        (folder / "mnist" / f"{name}.gz").write_bytes(gzip.compress(idx.encode(array), mtime=0))


def hub(arrays):
    """A stand-in for the `datasets` library that serves the arrays."""

    def load_dataset(name, split):
        assert name == "ylecun/mnist"
        part = {"train": "train", "test": "t10k"}[split]
        images, labels = arrays[f"{part}-images-idx3-ubyte"], arrays[f"{part}-labels-idx1-ubyte"]
        return {"image": list(images), "label": labels.tolist()}

    return SimpleNamespace(load_dataset=load_dataset)


def check(splits, arrays):
    for part, samples in (("train", splits.train), ("t10k", splits.test)):
        images = arrays[f"{part}-images-idx3-ubyte"]
        np.testing.assert_allclose(samples.inputs.numpy(), images.reshape(len(images), 784) / 255, rtol=1e-6)
        assert samples.labels.tolist() == arrays[f"{part}-labels-idx1-ubyte"].tolist()


@pytest.mark.usefixtures("small_is_published")
def test_reads_the_gzipped_files(tmp_path, small):
    lay_down(tmp_path, small)
    check(mnist(tmp_path), small)


@pytest.mark.usefixtures("small_is_published")
def test_the_environment_names_the_folder_when_nothing_else_does(tmp_path, small, monkeypatch):
    lay_down(tmp_path, small)
    monkeypatch.setenv("HBLL_DATA", str(tmp_path))
    check(mnist(), small)
    assert data_folder(tmp_path / "other") == tmp_path / "other"


@pytest.mark.usefixtures("small_is_published")
@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_file_is_named_with_both_checksums(tmp_path, small, name):
    lay_down(tmp_path, small)
    file = tmp_path / "mnist" / f"{name}.gz"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="damaged") as error:
        mnist(tmp_path)
    assert str(file) in str(error.value)
    assert PACKED_MD5[name] in str(error.value)
    assert md5(content) in str(error.value)


@pytest.mark.usefixtures("small_is_published")
@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_named_with_what_to_do(tmp_path, small, name):
    lay_down(tmp_path, small)
    file = tmp_path / "mnist" / f"{name}.gz"
    file.unlink()
    with pytest.raises(ValueError, match="put it there, or name the folder") as error:
        mnist(tmp_path)
    assert str(file) in str(error.value)


def test_without_files_and_without_the_library_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        mnist(tmp_path)


@pytest.mark.usefixtures("small_is_published")
def test_a_download_is_laid_down_and_read_without_the_library_later(tmp_path, small, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", hub(small))
    check(mnist(tmp_path), small)
    monkeypatch.setitem(sys.modules, "datasets", None)
    check(mnist(tmp_path), small)


@pytest.mark.usefixtures("small_is_published")
def test_a_download_with_other_contents_is_refused(tmp_path, small, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", hub(small | {"train-labels-idx1-ubyte": np.zeros(3, np.uint8)}))
    with pytest.raises(ValueError, match="train-labels-idx1-ubyte is damaged"):
        mnist(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", hub(small))
    check(mnist(tmp_path), small)


def test_a_failed_download_is_one_sentence(tmp_path, monkeypatch):
    def load_dataset(name, split):
        raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(ValueError, match="could not be downloaded: no network"):
        mnist(tmp_path)


def test_the_published_files(mnist_folder):
    splits = mnist(mnist_folder)
    counts = splits.train.labels.bincount().tolist()
    assert counts == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert splits.test.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert splits.train.inputs.shape == (60_000, 784)
    # The mean and the standard deviation of a pixel that everybody normalises by.
    assert abs(splits.train.inputs.mean() - 0.1307) < 5e-5
    assert abs(splits.train.inputs.std() - 0.3081) < 5e-5


def test_the_unpacked_checksums_are_those_of_the_published_files(mnist_folder):
    for name in NAMES:
        content = gzip.decompress((mnist_folder / "mnist" / f"{name}.gz").read_bytes())
        assert md5(content) == UNPACKED_MD5[name]
