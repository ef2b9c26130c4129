"""The transformer recipe: its network and what it may look at."""

import pytest
import torch

from hbll.recipes import RECIPES

Recipe = RECIPES["shakespeare-gpt"]


def test_by_default_seven_blocks_of_width_64_on_128_characters():
    network = Recipe().network()
    characters = torch.randint(65, (2, 128))
    assert len(network.blocks) == 7
    assert network.embed(characters).shape == (2, 128, 64)
    assert network(characters).shape == (2, 128, 65)


def test_a_character_is_predicted_from_those_before_it():
    recipe = Recipe(width=8, blocks=2, context=12)
    network, characters = recipe.initial_network(0), torch.randint(65, (3, 12))
    changed = characters.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 65
    differs = (network(characters) - network(changed)).abs().amax((0, 2)) > 1e-6
    assert differs.tolist() == [False] * 7 + [True] * 5


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"context": 0}, "--context must be at least 1, not 0"),
        ({"width": 7}, "--width must be a multiple of its 2 attention heads, not 7"),
        ({"width": 6, "positions": "rotary"}, "--positions rotary .* --width must be a multiple of 4"),
        ({"width": 200}, "--width must be a multiple of its 3 attention heads, not 200"),
    ],
)
def test_a_value_that_cannot_be_is_one_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Recipe(**options)
