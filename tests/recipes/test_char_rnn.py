"""The character model: its text, its sequences, its network."""

import pytest
import torch

from hbll.data.text import next_characters, tiny_shakespeare
from hbll.recipes import RECIPES

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


def test_the_network_predicts_after_every_character():
    recipe = RECIPES["char-rnn"](depth=3, width=8)
    network = recipe.initial_network(0)
    x = torch.randint(65, (4, 8))
    assert network(x).shape == (4, 8, 65)
    for method in ("hbll", "bptt", "paper"):
        step = recipe.objective(method)(network, x, x)
        step.loss.backward()
        assert step.loss.isfinite()


def test_a_symbol_that_there_is_not():
    with pytest.raises(ValueError, match="numbered 0 to 64"):
        RECIPES["char-rnn"](depth=2, width=8).initial_network(0)(torch.tensor([[65, 0, 0, 0]]))
