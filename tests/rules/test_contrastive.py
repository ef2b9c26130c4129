"""Contrastive Forward-Forward. Oracles: closed forms, and the formula pair by pair."""

import math

import pytest
import torch
import torch.nn.functional as F
from tests.networks import residual

from hbll import Step
from hbll.rules import make_rule
from hbll.rules.contrastive import contrastive_loss


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


def test_margins_shrink_from_the_first_stage_to_the_last():
    network, x, y = residual(4)
    rule, step = make_rule("cff", network), Step()
    *losses, at_head = [loss.value for loss in rule.losses(x, y, step)]
    state = network.embed(x)
    for loss, block, margin in zip(losses, network.blocks, (0.4, 0.25, 0.1), strict=True):
        state = block(state)
        torch.testing.assert_close(loss, contrastive_loss(state, y, 0.15, margin))
    error = F.cross_entropy(network.head(state), y)
    torch.testing.assert_close(at_head, error)
    torch.testing.assert_close(step.label_loss, error)


def test_one_sample_cannot_be_contrasted():
    network, x, y = residual(3)
    with pytest.raises(ValueError, match="batches of two or more"):
        make_rule("cff", network)(x[:1], y[:1])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"temperature": 0.0}, "temperature must be positive; got 0.0"),
        ({"margins": (0.1,)}, r"margins are two numbers, of the first and of the last stage; got \(0.1,\)"),
        ({"margins": ("a", 0.1)}, "each of margins is a number; got 'a'"),
    ],
)
def test_what_cannot_be_is_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_rule("cff", residual(3)[0], **options)
