"""What recipes on images share: corrupted data, validation samples, RandAugment."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hbll.recipes import RECIPES
from hbll.recipes.images import ImageRecipe

DIGITS, VIT = RECIPES["digits"], RECIPES["cifar10-vit"]
OF_IMAGES = [recipe for recipe in RECIPES.values() if issubclass(recipe, ImageRecipe)]


def test_all_recipes_but_those_of_texts_have_images():
    texts = {"char-rnn", "novels-gpt", "shakespeare-gpt", "wikitext-gpt"}
    assert {recipe.name for recipe in OF_IMAGES} == set(RECIPES) - texts


def test_training_and_test_images_are_corrupted_apart():
    plain = DIGITS().load(None)
    found = DIGITS(missing=0.5, test_label_noise=0.25).load(None)
    lost = (found.train.inputs != plain.train.inputs).sum(1)
    assert not found.train.inputs[found.train.inputs != plain.train.inputs].any()
    assert (lost <= 32).all()  # of 64 pixels, some of which are 0 anyway
    assert ((found.train.inputs == 0).sum(1) >= 32).all()
    assert found.train.labels.equal(plain.train.labels)
    assert found.test.inputs.equal(plain.test.inputs)
    assert int((found.test.labels != plain.test.labels).sum()) == 90

    found = DIGITS(test_missing=1.0, label_noise=0.1).load(None)
    assert found.train.inputs.equal(plain.train.inputs)
    assert int((found.train.labels != plain.train.labels).sum()) == round(0.1 * 1437)
    assert not found.test.inputs.any()
    assert found.test.labels.equal(plain.test.labels)


def test_patches_of_a_flat_image_are_squares():
    found = DIGITS(missing=0.5, missing_unit="patches").load(None).train.inputs.view(-1, 2, 4, 2, 4)
    plain = DIGITS().load(None).train.inputs.view(-1, 2, 4, 2, 4)
    kept = (found == plain).all(4).all(2)
    empty = (found == 0).all(4).all(2)
    assert (kept | empty).all()
    assert (empty.sum((1, 2)) >= 2).all()


def test_the_corruption_is_that_of_its_seed():
    first, again, other = (DIGITS(missing=0.5, label_noise=0.5, corruption_seed=seed).load(None) for seed in (0, 0, 1))
    assert first.train.inputs.equal(again.train.inputs)
    assert first.train.labels.equal(again.train.labels)
    assert not first.train.inputs.equal(other.train.inputs)
    assert not first.train.labels.equal(other.train.labels)


@pytest.mark.parametrize("recipe", ["cifar10-conv", "cifar100-vit"])
def test_labels_are_wrong_among_all_classes(small_data, recipe):
    plain, noisy = (RECIPES[recipe](label_noise=share).load(small_data).train.labels for share in (0.0, 1.0))
    assert (plain != noisy).all()
    assert noisy.max() < RECIPES[recipe].classes
    assert noisy.max() >= RECIPES[recipe].classes // 2


def test_validation_samples_are_the_last_of_the_training_samples():
    plain, held = DIGITS().splits(None), DIGITS(validation_samples=200, train_samples=1000).splits(None)
    assert held.valid.inputs.equal(plain.train.inputs[-200:])
    assert held.valid.labels.equal(plain.train.labels[-200:])
    assert held.train.inputs.equal(plain.train.inputs[:1000])
    assert held.test.inputs.equal(plain.test.inputs)
    assert plain.valid is None
    with pytest.raises(ValueError, match="--train-samples 1238 is more than the 1237 there are"):
        DIGITS(validation_samples=200, train_samples=1238).splits(None)
    with pytest.raises(ValueError, match="--validation-samples 1437 leaves none of the 1437"):
        DIGITS(validation_samples=1437).splits(None)


def test_sequences_of_validation_samples_too(small_data, monkeypatch):
    recipe = RECIPES["sequential-mnist"](depth=2, validation_samples=200)
    monkeypatch.setattr(type(recipe), "images", lambda self, data_dir: flat(600))
    splits = recipe.load(None)
    assert splits.valid.inputs.shape == (200, 4, 196)
    assert splits.valid.inputs.flatten(1).equal(flat(600).train.inputs[-200:])


def flat(count):
    draw = torch.Generator().manual_seed(0)
    splits = DIGITS().load(None)
    samples = replace(splits.train, inputs=torch.rand(count, 784, generator=draw), labels=torch.arange(count) % 10)
    return replace(splits, train=samples, test=samples)


def test_rand_augment_sees_pixels_and_gives_standardised_ones(monkeypatch):
    seen = []
    monkeypatch.setattr("hbll.recipes.images.rand_augment", lambda pixels, draw, count: seen.append(pixels) or pixels)
    monkeypatch.setattr("hbll.recipes.images.crop_and_flip", lambda images, draw: images)
    pixels = torch.rand(4, 3, 32, 32)
    mean = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
    deviation = torch.tensor([0.2470, 0.2435, 0.2616]).view(3, 1, 1)
    inputs = (pixels - mean) / deviation
    found = VIT(rand_augment=2).augment(inputs, np.random.default_rng(0))
    torch.testing.assert_close(seen[0], pixels, rtol=0, atol=1e-6)
    torch.testing.assert_close(found, inputs, rtol=0, atol=1e-5)
    VIT().augment(inputs, np.random.default_rng(0))
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"missing": 1.5}, "--missing is a share from 0 to 1, not 1.5"),
        ({"test_missing": -0.1}, "--test-missing is a share from 0 to 1, not -0.1"),
        ({"label_noise": float("nan")}, "--label-noise is a share from 0 to 1, not nan"),
        ({"test_label_noise": 2}, "--test-label-noise is a share from 0 to 1, not 2"),
        ({"corruption_seed": -1}, "--corruption-seed must be at least 0, not -1"),
        ({"validation_samples": 0}, "--validation-samples must be at least 1, not 0"),
    ],
)
def test_a_value_that_cannot_be_is_one_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        DIGITS(**options)


def test_a_number_of_operations_that_cannot_be_is_one_sentence():
    with pytest.raises(ValueError, match="--rand-augment must be at least 0, not -1"):
        VIT(rand_augment=-1)
