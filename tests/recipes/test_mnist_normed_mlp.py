"""The network that similarity matching was published on."""

import numpy as np
import pytest
import torch

from hbll.recipes import RECIPES

Recipe = RECIPES["mnist-normed-mlp"]


def test_by_default_it_is_the_papers():
    network = Recipe().network()
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == 2.9
    assert len(network.blocks) == 2  # the first of the three layers is the embed


@pytest.mark.parametrize(("options", "blocks"), [({"blocks": 5}, 5), ({"depth": 2}, 3), ({"blocks": 1}, 1)])
def test_other_depths_can_be_had(options, blocks):
    assert len(Recipe(width=4, **options).network().blocks) == blocks == Recipe(**options).block_count


def test_what_the_blocks_hand_on_is_not_dropped_out_but_what_they_and_the_head_see_is():
    torch.manual_seed(0)
    network = Recipe(width=200, dropout=0.5).network()
    state = network.embed(torch.rand(8, 784))
    for part in network.blocks:
        assert not (state == 0).any()
        zeros = (part[0](state) == 0).float().mean()
        assert abs(zeros - 0.5) < 0.1
        state = part(state)
    assert not network.head(state).equal(network.head(state))
    assert network.eval().head(state).equal(network.head(state))


def test_images_are_moved_by_two_pixels_at_most():
    image = torch.zeros(1, 28, 28)
    image[0, 2:26, 2:26] = torch.rand(24, 24) + 0.1  # nothing of it is moved out
    varied = Recipe().augment(image.view(1, 784).expand(300, 784), np.random.default_rng(0)).view(300, 28, 28)
    assert len(varied.flatten(1).unique(dim=0)) == 25
    for one in varied:
        rows, columns = (one > 0).any(1).nonzero().flatten(), (one > 0).any(0).nonzero().flatten()
        assert one[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].equal(image[0, 2:26, 2:26])


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_dropout_is_a_share(share):
    with pytest.raises(ValueError, match="--dropout must be at least 0 and less than 1"):
        Recipe(dropout=share)
