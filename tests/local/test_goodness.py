"""Forward-Forward's and its contrastive form's losses. Oracles: closed forms, and the formulas pair by pair."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from hbll.local.contrastive import contrastive_loss
from hbll.local.forward_forward import goodness, overlay, unit_length


def test_the_label_takes_the_place_of_the_first_pixels():
    x = torch.arange(24.0).view(2, 3, 2, 2) + 100
    found = overlay(x, torch.tensor([4, 0]), 5)
    assert found.shape == x.shape
    assert found.flatten(1)[:, :5].tolist() == [[0, 0, 0, 0, 1], [1, 0, 0, 0, 0]]
    assert found.flatten(1)[:, 5:].equal(x.flatten(1)[:, 5:])
    assert x.flatten()[0] == 100  # the input itself stays as it is


@given(st.integers(0, 2**20), st.sampled_from([(5,), (3, 4), (3, 2, 2)]), st.floats(0.01, 100))
def test_only_the_direction_of_a_state_is_handed_on(seed, shape, scale):
    state = torch.randn(4, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found = unit_length(state)
    torch.testing.assert_close(found.square().flatten(1).mean(1), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(found, unit_length(scale * state))
    assert unit_length(torch.zeros(2, *shape)).equal(torch.zeros(2, *shape))


def test_goodness_is_the_sum_of_squares_averaged_over_pixels():
    torch.testing.assert_close(goodness(torch.tensor([[3.0, -4.0], [0.0, 1.0]])), torch.tensor([25.0, 1.0]))
    maps = torch.randn(3, 4, 2, 5)
    torch.testing.assert_close(goodness(maps), maps.square().sum((1, 2, 3)) / 10)
    torch.testing.assert_close(goodness(maps.flatten(2).mT), goodness(maps))


def contrast_by_loop(state, y, temperature, margin):
    unit = F.normalize(state, dim=1)
    losses = []
    for i in range(len(y)):

        def score(j, i=i):
            cosine = float(unit[i] @ unit[j])
            return (min(cosine + margin, 1) if y[i] == y[j] else cosine) / temperature

        others = [j for j in range(len(y)) if j != i]
        total = math.log(sum(math.exp(score(j)) for j in others))
        positive = [total - score(j) for j in others if y[i] == y[j]]
        losses.append(sum(positive) / len(positive) if positive else 0.0)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("margin", [0.0, 0.4])
def test_the_contrastive_loss_pair_by_pair(margin):
    state = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1, 0, 2, 1, 0])  # class 2 is there once
    expected = contrast_by_loop(state, y, 0.15, margin)
    assert contrastive_loss(state, y, 0.15, margin).item() == pytest.approx(expected)


def test_pixels_and_tokens_are_averaged():
    maps, y = torch.randn(6, 5, 2, 3), torch.tensor([0, 1, 0, 1, 1, 0])
    expected = contrastive_loss(maps.mean((2, 3)), y, 0.15, 0.1)
    torch.testing.assert_close(contrastive_loss(maps, y, 0.15, 0.1), expected)
    torch.testing.assert_close(contrastive_loss(maps.flatten(2).mT, y, 0.15, 0.1), expected)


def test_classes_apart_in_opposite_directions():
    """Two classes of two samples at cosine -1: one positive at cosine 1 against two at -1."""
    state, y = torch.tensor([[1.0], [2.0], [-1.0], [-5.0]]), torch.tensor([0, 0, 1, 1])
    expected = math.log(math.exp(1 / 0.5) + 2 * math.exp(-1 / 0.5)) - 1 / 0.5
    assert contrastive_loss(state, y, 0.5, 0.0).item() == pytest.approx(expected, rel=1e-5)


def test_pairs_within_the_margin_are_left_alone():
    """Beyond 1 - margin nothing pulls a positive pair closer; negatives go on pushing."""
    angle = torch.tensor(0.3, requires_grad=True)  # between the pair: cosine 0.955; the negative is at a right angle
    pair = [torch.tensor([1.0, 0.0]), torch.stack([angle.cos(), angle.sin()])]
    state, y = torch.stack([*pair, torch.tensor([0.0, 1.0])]), torch.tensor([0, 0, 1])
    (without,), (within,) = (
        torch.autograd.grad(contrastive_loss(state, y, 1.0, margin), angle, retain_graph=True) for margin in (0.0, 0.1)
    )
    # The second's loss is log(exp(1) + exp(sin angle)) - 1, the first's is constant, the negative has none.
    share = math.exp(math.sin(0.3)) / (math.e + math.exp(math.sin(0.3)))
    assert within.item() == pytest.approx(share * math.cos(0.3) / 3, rel=1e-5)
    assert without > within
