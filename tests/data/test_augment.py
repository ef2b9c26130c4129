"""Shifts and mirrorings, against all the images that they can make."""

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hbll.data.augment import crop_and_flip, shift


def every_variant(image):
    """By shift down, shift right and whether it is mirrored: pixel by pixel what the image then is."""
    _, height, width = image.shape
    variants = {}
    for down in range(-4, 5):
        for right in range(-4, 5):
            moved = torch.zeros_like(image)
            for row in range(height):
                for column in range(width):
                    if 0 <= row - down < height and 0 <= column - right < width:
                        moved[:, row, column] = image[:, row - down, column - right]
            variants[down, right, False] = moved
            variants[down, right, True] = torch.stack([moved[..., width - 1 - column] for column in range(width)], -1)
    return variants


@pytest.mark.parametrize("shape", [(3, 5, 6), (1, 7, 5)])
def test_every_image_is_one_of_its_variants_and_all_are_as_likely(shape):
    image = torch.rand(shape)  # no two variants of which are equal
    variants = every_variant(image)
    count = 200 * len(variants)
    found = crop_and_flip(image.expand(count, *shape), np.random.default_rng(0))
    tally = Counter(one.tobytes() for one in found.numpy())
    assert set(tally) == {variant.contiguous().numpy().tobytes() for variant in variants.values()}
    assert len(tally) == 9 * 9 * 2
    # Each is drawn 200 times, give or take five standard deviations.
    assert all(abs(times - 200) < 5 * 200**0.5 for times in tally.values())


def test_images_are_drawn_one_by_one_and_keep_their_places():
    images = torch.arange(1.0, 41.0).view(40, 1, 1, 1).expand(40, 2, 9, 9)
    found = crop_and_flip(images, np.random.default_rng(0))
    assert found.shape == images.shape
    assert found[..., 4, 4].equal(images[..., 4, 4])  # the middle is never moved out
    masks = (found != 0).flatten(1)
    assert len(masks.unique(dim=0)) > 20


def test_the_generator_decides_all():
    images = torch.rand(8, 3, 32, 32)
    first, again, other = (crop_and_flip(images, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.equal(again)
    assert not first.equal(other)
    assert F.pad(images, (4,) * 4).sum() >= first.sum()


@pytest.mark.parametrize("margin", [0, 2, 4])
def test_shifts_alone_are_the_variants_that_are_not_mirrored(margin):
    image = torch.rand(1, 5, 6)
    within = {
        variant.contiguous().numpy().tobytes()
        for (down, right, mirrored), variant in every_variant(image).items()
        if max(abs(down), abs(right)) <= margin and not mirrored
    }
    found = shift(image.expand(30 * len(within), 1, 5, 6), np.random.default_rng(0), margin)
    assert {one.tobytes() for one in found.numpy()} == within
