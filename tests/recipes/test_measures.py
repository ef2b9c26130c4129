import math

import pytest
import torch

from hbll.recipes import RECIPES
from hbll.recipes.measures import (
    ACCURACY,
    BITS_PER_BYTE,
    BITS_PER_CHARACTER,
    CROSS_ENTROPY,
    PERPLEXITY,
    TOP_5_ACCURACY,
)


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
def test_every_recipe_says_the_share_of_right_answers_and_models_of_language_how_well_they_predict(recipe):
    characters = ["bits_per_character", "cross_entropy", "accuracy"]
    tokens = ["perplexity", "word_perplexity", "bits_per_byte", "accuracy"]
    expected = {
        "char-rnn": characters,
        "shakespeare-gpt": characters,
        "novels-gpt": tokens,
        "wikitext-gpt": tokens,
        "cifar100-vit": ["accuracy", "top_5_accuracy"],
    }
    assert [measure.name for measure in recipe.measures] == expected.get(recipe.name, ["accuracy"])


def test_among_five_is_who_fewer_than_five_classes_beat():
    logits = torch.stack([torch.randperm(9) for _ in range(50)]).float()
    labels = torch.randint(9, (50,))
    beaten_by = [int((row > row[label]).sum()) for row, label in zip(logits, labels, strict=True)]
    assert TOP_5_ACCURACY.values(logits, labels).tolist() == [number < 5 for number in beaten_by]


@pytest.mark.parametrize("measure", [CROSS_ENTROPY, PERPLEXITY, BITS_PER_BYTE, ACCURACY, TOP_5_ACCURACY])
def test_a_label_that_is_none_counts_nothing(measure):
    logits, labels = torch.randn(2, 3, 7), torch.randint(7, (2, 3))
    labels[1, 1] = -100
    values = measure.values(logits, labels)
    assert values[1, 1] == 0
    labels[1, 1] = 0
    kept = torch.ones(2, 3, dtype=torch.bool)
    kept[1, 1] = False
    assert values[kept].equal(measure.values(logits, labels)[kept])


def test_the_best_accuracy_is_the_highest_and_the_best_perplexity_the_lowest():
    assert ACCURACY.best([0.1, 0.3, 0.2]) == 0.3
    assert PERPLEXITY.best([20.0, 10.0, 30.0]) == 10.0
