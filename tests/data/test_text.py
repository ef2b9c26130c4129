"""Texts cut into sequences of characters, and the published text."""

import pytest

from hbll.data.text import next_characters, tiny_shakespeare

TEXT = "the quick brown fox jumps over the lazy dog. " * 9


def test_labels_are_the_characters_that_follow():
    splits = next_characters(TEXT, 7)
    alphabet = sorted(set(TEXT))

    def read(codes):
        return "".join(alphabet[code] for code in codes.flatten().tolist())

    border = len(TEXT) - len(TEXT) // 10
    for samples, text in ((splits.train, TEXT[:border]), (splits.test, TEXT[border:])):
        count = (len(text) - 1) // 7
        assert samples.inputs.shape == samples.labels.shape == (count, 7)
        assert read(samples.inputs) == text[: 7 * count]
        assert read(samples.labels) == text[1 : 7 * count + 1]


def test_too_short_a_text():
    with pytest.raises(ValueError, match="too short for sequences of 50"):
        next_characters(TEXT, 50)


def test_a_text_that_is_missing_or_damaged(tmp_path):
    with pytest.raises(ValueError, match=r"input\.txt is missing"):
        tiny_shakespeare(tmp_path)
    (tmp_path / "tinyshakespeare").mkdir()
    (tmp_path / "tinyshakespeare" / "input.txt").write_text(TEXT)
    with pytest.raises(ValueError, match=r"input\.txt is damaged"):
        tiny_shakespeare(tmp_path)
