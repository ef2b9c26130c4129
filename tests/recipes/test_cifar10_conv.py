"""The convolutional recipe: its network and its augmentation."""

import numpy as np
import torch

from hbll.recipes import RECIPES

Recipe = RECIPES["cifar10-conv"]


def test_by_default_seven_blocks_of_width_32_on_patches_of_4_x_4():
    network = Recipe().network()
    images = torch.rand(2, 3, 32, 32)
    assert len(network.blocks) == 7
    assert network.embed(images).shape == (2, 32, 8, 8)
    assert network(images).shape == (2, 10)


def test_training_images_are_moved_and_test_images_are_not(small_data):
    recipe = Recipe()
    inputs = recipe.splits(small_data).train.inputs[:20]
    varied = recipe.augment(inputs, np.random.default_rng(0))
    assert varied.shape == inputs.shape
    assert not any(one.equal(other) for one, other in zip(inputs, varied, strict=True))
