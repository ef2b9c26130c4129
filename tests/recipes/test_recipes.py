from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hbll import machine
from hbll.recipes import RECIPES, flag

DIGITS, MNIST = RECIPES["digits"], RECIPES["mnist-mlp"]


def test_recipes_go_by_their_names():
    assert all(recipe.name == name for name, recipe in RECIPES.items())
    assert list(RECIPES) == sorted(RECIPES)
    assert all(recipe.__doc__ for recipe in RECIPES.values())


@pytest.mark.parametrize("recipe", RECIPES.values())
def test_every_recipe_has_the_common_options(recipe):
    names = {field.name for field in fields(recipe)}
    assert names >= {"depth", "blocks", "width", "epochs", "batch_size", "train_samples"}
    assert names >= {"optimizer", "learning_rate", "schedule", "weight_decay", "gradient_clip"}


@given(st.integers(1, 12))
def test_a_depth_means_a_full_tree(depth):
    assert DIGITS(depth=depth).block_count == 2**depth - 1


@given(st.integers(1, 100))
def test_any_number_of_blocks_can_be_had(blocks):
    assert DIGITS(blocks=blocks).block_count == blocks


def test_digits_by_default_have_seven_blocks_of_width_64():
    network = DIGITS().network()
    assert len(network.blocks) == 7
    assert network(torch.rand(2, 64)).shape == (2, 10)
    assert network.embed(torch.rand(2, 64)).shape == (2, 64)


@pytest.mark.parametrize(("depth", "layers"), [(2, 4), (3, 8), (4, 16)])
def test_mnist_has_the_layers_of_the_papers_table(depth, layers):
    width = 50
    network = MNIST(depth=depth, width=width).network()
    # The hidden layers are the embed and the blocks; nothing but their weights and the head's is there.
    hidden = (784 + 1) * width + (layers - 1) * (width + 1) * width
    assert sum(parameter.numel() for parameter in network.parameters()) == hidden + (width + 1) * 10
    states = network.embed(torch.rand(4, 784))
    assert ((states > 0) & (states < 1)).all()


def test_the_initial_network_is_a_function_of_the_seed():
    first, again, other = (DIGITS().initial_network(seed).state_dict() for seed in (3, 3, 4))
    assert all(first[name].equal(again[name]) for name in first)
    assert not any(first[name].equal(other[name]) for name in first)


def test_training_on_fewer_samples_takes_the_first_and_leaves_the_test_samples():
    whole, part = DIGITS().splits(None), DIGITS(train_samples=100).splits(None)
    assert part.train.inputs.equal(whole.train.inputs[:100])
    assert part.train.labels.equal(whole.train.labels[:100])
    assert part.test.inputs.equal(whole.test.inputs)


def test_more_samples_than_there_are_cannot_be_had():
    with pytest.raises(ValueError, match="--train-samples 1438 is more than the 1437 there are"):
        DIGITS(train_samples=1438).splits(None)


def test_a_batch_must_be_had():
    with pytest.raises(ValueError, match="--train-samples 60 is less than the 64 samples of a step"):
        DIGITS(train_samples=60, batch_size=32, accumulate=2).splits(None)
    with pytest.raises(ValueError, match="--batch-size 719 x 2 is more than the 1437 training samples"):
        DIGITS(batch_size=719, accumulate=2).splits(None)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"depth": 2, "blocks": 3}, "--depth or --blocks, not both"),
        ({"depth": 0}, "--depth must be at least 1, not 0"),
        ({"depth": 13}, "--depth must be at most 12, not 13"),
        ({"blocks": 0}, "--blocks must be at least 1, not 0"),
        ({"width": -1}, "--width must be at least 1, not -1"),
        ({"epochs": 0}, "--epochs must be at least 1"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"train_samples": 0}, "--train-samples must be at least 1"),
        ({"learning_rate": 0.0}, "--learning-rate must be above 0 and finite"),
        ({"learning_rate": float("nan")}, "--learning-rate must be above 0 and finite"),
        ({"weight_decay": -0.1}, "--weight-decay must be at least 0 and finite"),
        ({"stage": 0}, "--stage must be at least 1, not 0"),
        ({"stage": (3, 0)}, "--stage must be at least 1, not 0"),
        ({"sweeps": 0}, "--sweeps must be at least 1, not 0"),
        ({"credit_sweeps": -1}, "--credit-sweeps must be at least 0, not -1"),
        ({"tolerance": -0.1}, "--tolerance must be at least 0 and finite, not -0.1"),
        ({"rim": -0.1}, "--rim must be at least 0 and finite, not -0.1"),
        ({"rim": float("nan")}, "--rim must be at least 0 and finite, not nan"),
    ],
)
def test_a_value_that_cannot_be_is_one_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        DIGITS(**options)


@pytest.mark.parametrize("recipe", RECIPES.values())
def test_parameters_are_counted_without_making_the_network(recipe):
    sizes = (
        [{}] if recipe.name in ("cifar10-resnet", "cifar10-vgg") else [{}, {"blocks": 1}, {"blocks": 5}, {"depth": 3}]
    )
    for size in sizes:
        made = recipe(width=8, **size) if size else recipe()
        assert made.parameter_count() == sum(parameter.numel() for parameter in made.network().parameters())


def test_a_network_that_cannot_be_trained_in_the_memory_there_is_is_not_made(monkeypatch):
    # 7 blocks of 64 x 65 parameters, an embed of 65 x 64 and a head of 65 x 10: each with gradient and two moments.
    parameters = 7 * 65 * 64 + 65 * 64 + 65 * 10
    monkeypatch.setattr(machine, "machine_bytes", lambda: float(16 * parameters + 7 * 2**13))
    DIGITS().initial_network(0)
    monkeypatch.setattr(machine, "machine_bytes", lambda: float(16 * parameters + 7 * 2**13 - 1))
    with pytest.raises(ValueError, match="to train 7 blocks of width 64 would need"):
        DIGITS().initial_network(0)


def test_blocks_are_taken_instead_of_any_usual_depth():
    char_rnn = RECIPES["char-rnn"]
    assert [char_rnn(**size).block_count for size in ({}, {"blocks": 31}, {"depth": 5})] == [63, 31, 31]


def test_an_option_is_spelt_as_on_the_command_line():
    assert flag("batch_size") == "--batch-size"
