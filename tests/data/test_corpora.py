"""Long texts in tokens: how they are checked, kept, and cut. Synthetic files pass for the published ones."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from hbll.data import corpora
from hbll.data.corpora import CORPORA, encoded
from hbll.data.vocabulary import Characters


def text_of(folder, corpus, part):
    return (folder / corpus / CORPORA[corpus].files.format(part)).read_text()


def test_every_token_to_train_on_is_followed_by_its_label(small_data):
    found = encoded(CORPORA["novels"], "characters", data_dir=small_data)
    splits, text = found.splits(7), text_of(small_data, "novels", "train")
    count = (len(text) - 1) // 7
    assert splits.train.inputs.shape == splits.train.labels.shape == (count, 7)
    assert found.vocabulary.decode(splits.train.inputs.flatten().tolist()) == text[: 7 * count]
    assert found.vocabulary.decode(splits.train.labels.flatten().tolist()) == text[1 : 7 * count + 1]


@pytest.mark.parametrize("part", ["valid", "test"])
@pytest.mark.parametrize("context", [7, 10, 500])
def test_every_token_to_test_on_is_a_label_once(small_data, part, context):
    found = encoded(CORPORA["wikitext-2"], "words", data_dir=small_data)
    samples, text = getattr(found.splits(context), part), text_of(small_data, "wikitext-2", part)
    labels, inputs = samples.labels.flatten(), samples.inputs.flatten()
    counted = labels != -100
    assert found.vocabulary.decode(labels[counted].tolist()) == text
    assert counted.tolist() == sorted(counted.tolist(), reverse=True)
    assert len(labels) - int(counted.sum()) < context
    assert inputs[0] == found.vocabulary.start
    assert inputs[1:][counted[1:]].equal(labels[:-1][counted[1:]])
    words = sum(len(line.split()) + 1 for line in text.splitlines())
    assert samples.units == {"words": words, "bytes": len(text.encode())}
    assert int(counted.sum()) == words  # these are the tokens as published


def test_the_words_of_a_plain_text_are_those_between_spaces(small_data):
    found = encoded(CORPORA["novels"], "bytepairs", 300, small_data)
    assert len(found.vocabulary) == 300
    text = text_of(small_data, "novels", "test")
    assert found.units["test"] == {"words": len(text.split()), "bytes": len(text.encode())}
    assert found.vocabulary.decode(found.tokens["test"].tolist()) == text


def test_tokens_are_made_once_and_mapped(small_data, monkeypatch):
    first = encoded(CORPORA["novels"], "bytepairs", 300, small_data)
    monkeypatch.setattr(corpora, "_encode", None)
    again = encoded(CORPORA["novels"], "bytepairs", 300, small_data)
    assert again.vocabulary == first.vocabulary
    for part in ("train", "valid", "test"):
        assert isinstance(again.tokens[part], np.memmap)
        assert again.tokens[part].tolist() == first.tokens[part].tolist()
    inputs = again.splits(5).train.inputs
    assert inputs.data_ptr() == again.tokens["train"].ctypes.data  # a view, no copy


def test_a_text_that_has_changed_is_checked_and_encoded_anew(small_data):
    encoded(CORPORA["wikitext-2"], "words", data_dir=small_data)
    file = small_data / "wikitext-2" / "wiki.train.tokens"
    file.write_text(file.read_text() + " more \n")
    with pytest.raises(ValueError, match=r"wiki\.train\.tokens is damaged"):
        encoded(CORPORA["wikitext-2"], "words", data_dir=small_data)


def test_what_is_left_of_an_interruption_is_not_taken_for_tokens(small_data, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            encoded(CORPORA["novels"], "characters", data_dir=small_data)
    assert sorted(path.name for path in (small_data / "novels").iterdir()) == [
        "novels.test.txt",
        "novels.train.txt",
        "novels.valid.txt",
    ]
    assert len(encoded(CORPORA["novels"], "characters", data_dir=small_data).tokens["test"])


def shortened(file):
    np.save(file, np.load(file)[:-40])


def beyond_the_vocabulary(file):
    tokens = np.load(file)
    tokens[3] = 10**6
    np.save(file, tokens)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("valid.npy", lambda file: file.write_bytes(file.read_bytes()[:50])),
        ("test.npy", shortened),
        ("train.npy", beyond_the_vocabulary),
        ("units.json", lambda file: file.write_text("{}")),
        ("vocabulary.json", lambda file: file.write_text(Characters("ab").json())),
        ("sums.json", lambda file: file.write_bytes(b"\xff")),
        ("sums.json", Path.unlink),
    ],
)
def test_damaged_tokens_are_made_anew(small_data, name, damage):
    first = encoded(CORPORA["novels"], "characters", data_dir=small_data)
    before = {part: tokens.tolist() for part, tokens in first.tokens.items()}
    (folder,) = (small_data / "novels").glob("characters-*")
    kept = {file.name: file.read_bytes() for file in folder.iterdir()}
    damage(folder / name)
    again = encoded(CORPORA["novels"], "characters", data_dir=small_data)
    assert {part: tokens.tolist() for part, tokens in again.tokens.items()} == before
    assert (again.vocabulary, again.units) == (first.vocabulary, first.units)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == kept
    assert [path.name for path in (small_data / "novels").iterdir() if path.is_dir()] == [folder.name]


@pytest.mark.parametrize(
    ("corpus", "part", "sentence"),
    [
        ("novels", "train", r"novels\.train\.txt is damaged: its sha256 is \w{64} and should be"),
        ("wikitext-2", "test", r"wiki\.test\.tokens is damaged, or that of another part or set: it has [\d,]+ bytes"),
    ],
)
def test_truncated_and_swapped_files_are_named(small_data, corpus, part, sentence):
    file = small_data / corpus / CORPORA[corpus].files.format(part)
    content = file.read_text()
    other = file.with_name(CORPORA[corpus].files.format("valid"))
    for wrong in (content[: len(content) // 2], content[:-1], other.read_text()):
        file.write_text(wrong)
        with pytest.raises(ValueError, match=sentence):
            encoded(CORPORA[corpus], "characters", data_dir=small_data)
    file.unlink()
    with pytest.raises(
        ValueError, match=rf"{file.name} of {CORPORA[corpus].title} is missing: put the published file there"
    ):
        encoded(CORPORA[corpus], "characters", data_dir=small_data)


def test_a_text_of_the_right_length_with_other_words_or_bytes_is_named(small_data):
    file = small_data / "wikitext-2" / "wiki.train.tokens"
    content = file.read_bytes()
    for wrong, sentence in (
        (content.replace(b" ", b"x", 1).replace(b" ", b"x", 1), r"it has [\d,]+ tokens and should have"),
        (content[:-3] + b"\xff" + content[-2:], r"wiki\.train\.tokens is damaged: it is no text in UTF-8"),
    ):
        file.write_bytes(wrong)
        with pytest.raises(ValueError, match=sentence):
            encoded(CORPORA["wikitext-2"], "characters", data_dir=small_data)


def test_without_the_large_wikitext_the_novels_are_offered(small_data):
    with pytest.raises(
        ValueError, match=r"wiki\.train\.tokens of WikiText-103 is missing: .* take the hundred novels .* novels-gpt"
    ):
        encoded(CORPORA["wikitext-103"], "words", data_dir=small_data)


def hub(folder):
    """A stand-in for the library `datasets`, which has the lines of WikiText-2's files in a folder."""

    def load_dataset(name, configuration, split):
        assert (name, configuration) == ("Salesforce/wikitext", "wikitext-2-v1")
        file = folder / f"wiki.{'valid' if split == 'validation' else split}.tokens"
        return {"text": ["" if line == " \n" else line for line in file.read_text().splitlines(keepends=True)]}

    return SimpleNamespace(load_dataset=load_dataset)


def test_wikitext_is_downloaded_as_published(small_data, tmp_path, monkeypatch):
    published = tmp_path / "published"
    (small_data / "wikitext-2").rename(published)
    lines = [" \n", " = Title = \n", *(published / "wiki.test.tokens").read_text().splitlines(keepends=True)]
    (published / "wiki.test.tokens").write_text("".join(lines))
    tokens = CORPORA["wikitext-2"].tokens | {"test": sum(len(line.split()) + 1 for line in lines)}
    lengths = CORPORA["wikitext-2"].lengths | {"test": len("".join(lines))}
    monkeypatch.setitem(sys.modules, "datasets", hub(published))
    longer = replace(CORPORA["wikitext-2"], tokens=tokens, lengths=lengths)
    found = encoded(longer, "words", data_dir=small_data)
    assert len(found.tokens["test"]) == tokens["test"]
    for file in published.iterdir():
        assert (small_data / "wikitext-2" / file.name).read_text() == file.read_text()


def test_a_failed_download_is_one_sentence(small_data, monkeypatch):
    def load_dataset(name, configuration, split):
        raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(ValueError, match="could not be downloaded: no network; or take the hundred novels"):
        encoded(CORPORA["wikitext-103"], "words", data_dir=small_data)
    assert not (small_data / "wikitext-103").exists()


def test_too_short_a_text(small_data):
    found = encoded(CORPORA["novels"], "characters", data_dir=small_data)
    short = replace(found, tokens={**found.tokens, "train": found.tokens["train"][:9]})
    with pytest.raises(ValueError, match="a text of 9 tokens is too short for sequences of 9"):
        short.splits(9)


def test_the_published_files():
    folder = os.environ.get("HBLL_DATA")
    if folder is None or not (Path(folder) / "wikitext-2").is_dir():
        pytest.skip("HBLL_DATA names no folder that holds wikitext-2/")
    CORPORA["wikitext-2"].check(Path(folder))
