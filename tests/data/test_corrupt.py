"""Erased pixels and noisy labels, counted one by one."""

from collections import Counter

import numpy as np
import pytest
import torch

from hbll.data.corrupt import erase, noisy_labels


@pytest.mark.parametrize(("share", "patch"), [(0.5, 1), (0.8, 1), (0.3, 2), (0.5, 4), (0.0, 1), (1.0, 2)])
def test_every_image_loses_exactly_the_share_of_its_patches_in_all_channels(share, patch):
    images = 1 + torch.rand(30, 3, 8, 12)
    found = erase(images, share, np.random.default_rng(0), patch)
    for before, after in zip(images, found, strict=True):
        lost = 0
        for row in range(0, 8, patch):
            for column in range(0, 12, patch):
                place = (slice(None), slice(row, row + patch), slice(column, column + patch))
                assert after[place].equal(before[place]) or not after[place].any()
                lost += not after[place].any()
        assert lost == round(share * (8 // patch) * (12 // patch))


def test_every_image_loses_pixels_of_its_own_and_all_are_as_likely():
    count, share = 4000, 0.25
    kept = erase(torch.ones(count, 1, 4, 4), share, np.random.default_rng(0)).flatten(1)
    assert len(kept.unique(dim=0)) > 1000
    lost = (1 - kept).sum(0)
    assert ((lost - share * count).abs() < 5 * (count * share * (1 - share)) ** 0.5).all()


def test_exactly_the_share_of_labels_is_another_class_and_all_others_are_as_likely():
    labels = torch.arange(20_000) % 5
    found = noisy_labels(labels, 0.4, 5, np.random.default_rng(0))
    wrong = found != labels
    assert int(wrong.sum()) == 8000
    tally = Counter(zip(labels[wrong].tolist(), found[wrong].tolist(), strict=True))
    assert len(tally) == 5 * 4
    assert all(abs(times - 400) < 5 * 400**0.5 for times in tally.values())
    assert noisy_labels(labels, 0.0, 5, np.random.default_rng(0)).equal(labels)


def test_the_generator_decides_all():
    images, labels = torch.rand(2500, 1, 4, 4), torch.arange(2500) % 7
    first, again, other = (erase(images, 0.5, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.equal(again)
    assert not first.equal(other)
    first, again, other = (noisy_labels(labels, 0.5, 7, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.equal(again)
    assert not first.equal(other)
