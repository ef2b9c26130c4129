import math

import pytest
import torch

from hbll.recipes import RECIPES
from hbll.recipes.measures import ACCURACY, BITS_PER_CHARACTER, CROSS_ENTROPY


def test_a_guess_among_n_characters_takes_log2_n_bits():
    logits, labels = torch.zeros(3, 5, 16), torch.randint(16, (3, 5))
    torch.testing.assert_close(BITS_PER_CHARACTER.values(logits, labels), torch.full((3, 5), 4.0))
    torch.testing.assert_close(CROSS_ENTROPY.values(logits, labels), torch.full((3, 5), math.log(16)))


def test_values_belong_to_their_labels():
    logits, labels = torch.randn(4, 3, 7), torch.randint(7, (4, 3))
    probabilities = logits.exp() / logits.exp().sum(-1, keepdim=True)
    for row in range(4):
        for column in range(3):
            own = probabilities[row, column, labels[row, column]]
            assert CROSS_ENTROPY.values(logits, labels)[row, column].item() == pytest.approx(
                -own.log().item(), rel=1e-5
            )
            right = bool(own == probabilities[row, column].max())
            assert bool(ACCURACY.values(logits, labels)[row, column]) == right


def test_people_read_shares_in_percent_and_bits_as_they_are():
    assert (ACCURACY.text(0.97216), ACCURACY.axis) == ("97.22 %", "accuracy, %")
    assert (BITS_PER_CHARACTER.text(2.34567), BITS_PER_CHARACTER.axis) == ("2.346", "bits per character")
    assert BITS_PER_CHARACTER.text(None) == ""


@pytest.mark.parametrize("recipe", RECIPES.values())
def test_every_recipe_says_the_share_of_right_answers_and_models_of_language_their_bits(recipe):
    names = [measure.name for measure in recipe.measures]
    language = recipe.name in ("char-rnn", "shakespeare-gpt")
    assert names == (["bits_per_character", "cross_entropy", "accuracy"] if language else ["accuracy"])
