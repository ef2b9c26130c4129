"""What all tests share."""

import hashlib
import os
import string
from dataclasses import replace
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

from hbll.data import cifar, corpora, text

hypothesis.settings.register_profile("hbll", deadline=None)  # machines are shared: time is no property of the code
hypothesis.settings.load_profile("hbll")

# The networks of the tests are too small for several threads to pay.
torch.set_num_threads(1)


@pytest.fixture
def command(capsys):
    """Runs a command of the command line in this process: (exit code, stdout, stderr)."""
    from hbll import cli  # here: the core is also tested where the libraries of the command line are not installed

    def run(*arguments):
        code = 0
        try:
            cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


@pytest.fixture
def mnist_folder() -> Path:
    """The folder that holds `mnist/`; skips the test where there is none."""
    folder = os.environ.get("HBLL_DATA")
    if folder is None or not (Path(folder) / "mnist").is_dir():
        pytest.skip("HBLL_DATA names no folder that holds mnist/")
    return Path(folder)


WORDS = ["the", "fox", "of", "a", "quick", "<unk>", "river", "sleeps", "over", "and", "dog", ",", ".", "lazily"]


@pytest.fixture
def small_data(tmp_path, monkeypatch) -> Path:
    """A data folder with small files in the published formats of CIFAR-10 and CIFAR-100, tiny Shakespeare, the novels and
    WikiText-2, which pass for those."""
    folder, draw = tmp_path / "data", np.random.default_rng(0)
    for name, sums, classes in (
        ("cifar-10-batches-bin", cifar.CIFAR10_SHA1, [10]),
        ("cifar-100-binary", cifar.CIFAR100_SHA1, [20, 100]),
    ):
        (folder / name).mkdir(parents=True)
        for file in sums:
            labels, pixels = draw.integers(classes, size=(60, len(classes))), draw.integers(256, size=(60, 3072))
            content = np.hstack([labels, pixels]).astype(np.uint8).tobytes()
            (folder / name / file).write_bytes(content)
            monkeypatch.setitem(sums, file, hashlib.sha1(content).hexdigest())
    alphabet = (string.ascii_letters + string.digits + string.punctuation)[: text.CHARACTERS]
    content = "".join(draw.permutation(list(alphabet * 40))).encode()
    (folder / "tinyshakespeare").mkdir()
    (folder / "tinyshakespeare" / "input.txt").write_bytes(content)
    monkeypatch.setattr(text, "SHA256", hashlib.sha256(content).hexdigest())
    for name in ("novels", "wikitext-2"):
        corpus = corpora.CORPORA[name]
        (folder / name).mkdir()
        sums, tokens, lengths = {}, {}, {}
        for part, lines in (("train", 200), ("valid", 9), ("test", 11)):
            content = "".join(" " + " ".join(draw.choice(WORDS, 6)) + " \n" for _ in range(lines)).encode()
            (folder / name / corpus.files.format(part)).write_bytes(content)
            sums[part], tokens[part] = hashlib.sha256(content).hexdigest(), 7 * lines
            lengths[part] = len(content)
        small = replace(corpus, sizes={"words": len(WORDS) + 1, "characters": len(set("".join(WORDS) + " \n"))})
        small = replace(small, sums=sums) if corpus.sums else replace(small, tokens=tokens, lengths=lengths)
        monkeypatch.setitem(corpora.CORPORA, name, small)
    return folder
