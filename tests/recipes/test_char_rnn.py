"""The recurrent character model: its network, and every method for a step."""

import pytest
import torch

from hbll.recipes import RECIPES


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
