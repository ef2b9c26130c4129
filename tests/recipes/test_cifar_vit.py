"""The recipes of vision transformers."""

import pytest
import torch

from hbll.recipes import RECIPES

CIFAR10, CIFAR100 = RECIPES["cifar10-vit"], RECIPES["cifar100-vit"]


@pytest.mark.parametrize(("recipe", "classes", "noise"), [(CIFAR10, 10, 0.005), (CIFAR100, 100, 0.002)])
def test_the_papers_network_and_hyper_parameters(recipe, classes, noise):
    paper = recipe.of_preset("paper")
    network = paper.network()
    images = torch.randn(2, 3, 32, 32)
    assert network.embed(images).shape == (2, 64, 128)
    assert network(images).shape == (2, classes)
    assert len(network.blocks) == 7
    assert all(block.heads == 4 and block.perceptron_in.out_features == 256 for block in network.blocks)
    assert (paper.batch_size, paper.optimizer, paper.learning_rate, paper.epochs) == (256, "adamw", 5e-4, 500)
    assert (paper.noise, paper.rand_augment) == (noise, 2)
    assert paper.rule("paper", network, None).credit.noise == noise


def test_options_go_before_the_presets():
    recipe = CIFAR10.of_preset("paper", epochs=3, noise=None)
    assert (recipe.epochs, recipe.noise, recipe.batch_size) == (3, None, 256)
    with pytest.raises(ValueError, match="unknown preset 'papr'; did you mean paper"):
        CIFAR10.of_preset("papr")


def test_what_a_preset_says_to_other_methods_is_no_option_that_was_given():
    CIFAR10.of_preset("paper").check(["bp"])
    CIFAR10.of_preset("paper", noise=0.1).check(["paper", "bp"])
    with pytest.raises(ValueError, match="--noise does nothing for bp"):
        CIFAR10.of_preset("paper", noise=0.1).check(["bp"])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"heads": 3}, "--heads must divide 64, not be 3"),
        ({"patch": 5}, "--patch must divide 32, not be 5"),
        ({"patch": 0}, "--patch must divide 32, not be 0"),
    ],
)
def test_a_value_that_cannot_be_is_one_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        CIFAR10(**options)
