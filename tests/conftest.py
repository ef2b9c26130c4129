"""What all tests share."""

import hashlib
import os
import string
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

from hbll.data import cifar, text

hypothesis.settings.register_profile("hbll", deadline=None)  # machines are shared: time is no property of the code
hypothesis.settings.load_profile("hbll")

# The networks of the tests are too small for several threads to pay.
torch.set_num_threads(1)


@pytest.fixture
def mnist_folder() -> Path:
    """The folder that holds `mnist/`; skips the test where there is none."""
    folder = os.environ.get("HBLL_DATA")
    if folder is None or not (Path(folder) / "mnist").is_dir():
        pytest.skip("HBLL_DATA names no folder that holds mnist/")
    return Path(folder)


@pytest.fixture
def small_data(tmp_path, monkeypatch) -> Path:
    """A data folder with small files in the published formats of CIFAR-10 and tiny Shakespeare, which pass for those."""
    folder, draw = tmp_path / "data", np.random.default_rng(0)
    (folder / "cifar-10-batches-bin").mkdir(parents=True)
    for name in cifar.CIFAR10_SHA1:
        labels, pixels = draw.integers(10, size=(60, 1)), draw.integers(256, size=(60, 3072))
        content = np.hstack([labels, pixels]).astype(np.uint8).tobytes()
        (folder / "cifar-10-batches-bin" / name).write_bytes(content)
        monkeypatch.setitem(cifar.CIFAR10_SHA1, name, hashlib.sha1(content).hexdigest())
    alphabet = (string.ascii_letters + string.digits + string.punctuation)[: text.CHARACTERS]
    content = "".join(draw.permutation(list(alphabet * 40))).encode()
    (folder / "tinyshakespeare").mkdir()
    (folder / "tinyshakespeare" / "input.txt").write_bytes(content)
    monkeypatch.setattr(text, "SHA256", hashlib.sha256(content).hexdigest())
    return folder
