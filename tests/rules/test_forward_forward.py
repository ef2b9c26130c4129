"""Forward-Forward. Oracles: closed forms, and the paper's description transcribed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tests.networks import CLASSES, residual, transformer
from torch import nn

from hbll import Chain, Step
from hbll.models.mlp import normed_layer
from hbll.rules import make_rule
from hbll.rules.forward_forward import goodness, overlay, unit_length


def layers(normed=False):
    torch.manual_seed(0)
    found = [normed_layer(12, 8), normed_layer(8, 6), normed_layer(6, 6)]
    if not normed:
        found = [nn.Sequential(layer[0], nn.Tanh()) for layer in found]
    network = Chain(nn.Identity(), found, nn.Linear(6, 3)).double()
    return network, torch.randn(10, 12, dtype=torch.float64), torch.randint(3, (10,))


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


def outputs(network, x, y):
    """What each block hands on of inputs under labels, by the paper's description."""
    state = network.embed(unit_length(overlay(x, y, 3)))
    found = []
    for n, block in enumerate(network.blocks):
        state = block(unit_length(state) if n else state)
        found.append(state)
    return found


@pytest.fixture
def next_label(monkeypatch):
    """Wrong labels are the ones after the right ones."""
    monkeypatch.setattr(torch, "randint_like", lambda y, low, high: torch.ones_like(y))


@pytest.mark.usefixtures("next_label")
@pytest.mark.parametrize("make", [layers, lambda: residual(4)])
def test_the_loss_is_the_likelihood_of_right_and_wrong(make):
    network, x, y = make()
    rule, step = make_rule("ff", network, threshold=0.4), Step()
    at_head, *losses = [(loss.stage, loss.value) for loss in rule.losses(x, y, step)]
    assert [k for k, _ in losses] == [1, 2, 3]
    for (_, loss), right, wrong in zip(losses, outputs(network, x, y), outputs(network, x, (y + 1) % 3), strict=True):
        units = right.shape[1]
        is_right, is_wrong = (torch.sigmoid(goodness(out) - 0.4 * units) for out in (right, wrong))
        torch.testing.assert_close(loss, -(is_right.log() + (1 - is_wrong).log()).mean())
    error = F.cross_entropy(network(x), y)
    torch.testing.assert_close(at_head[1], error)
    torch.testing.assert_close(step.label_loss, error)


@pytest.mark.usefixtures("next_label")
def test_the_symmetric_loss_compares_right_and_wrong():
    network, x, y = layers()
    right, wrong = outputs(network, x, y)[0], outputs(network, x, (y + 1) % 3)[0]
    expected = -torch.sigmoid(goodness(right) - goodness(wrong)).log().mean()
    step = make_rule("ff", network, contrast="symmetric")(x, y)
    assert step.reports[1].error == pytest.approx(expected.item())


def test_wrong_labels_are_all_the_others(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "hbll.rules.forward_forward.overlay", lambda x, y, c: seen.append(y.clone()) or overlay(x, y, c)
    )
    network, _, _ = layers()
    make_rule("ff", network)(torch.randn(600, 12, dtype=torch.float64), torch.arange(600) % 3)
    right, wrong = seen
    assert right.equal(torch.arange(600) % 3)
    assert not (wrong == right).any()
    shares = torch.bincount((wrong - right) % 3, minlength=3) / 600
    assert abs(shares[1] - 0.5) < 5 * (0.25 / 600) ** 0.5


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_are_those_of_the_chain(momentum):
    network, x, y = layers(normed=True)
    network.embed = nn.BatchNorm1d(12).double()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.momentum = momentum
    same, rule = copy.deepcopy(network), make_rule("ff", network)
    for _ in range(3):
        rule(x, y)
        same(x)
    for ours, theirs in zip(network.buffers(), same.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert all(m.track_running_stats for m in network.modules() if isinstance(m, nn.BatchNorm1d))


@pytest.mark.parametrize("stage", [1, 3])
def test_scores_are_the_goodness_behind_the_first_stage(stage):
    network, x, _ = layers()
    chain, by_goodness = make_rule("ff", network, stage=stage).readouts
    assert (chain.name, by_goodness.name, by_goodness.blocks) == ("1-2-3", "goodness", 3)
    scores = by_goodness.scores(x)
    assert scores.shape == (10, 3)
    for label in range(3):
        state = unit_length(overlay(x, torch.full((10,), label), 3))
        if stage == 3:  # there is none behind it
            expected = goodness(nn.Sequential(*network.blocks)(state))
        else:
            _, second, third = outputs(network, x, torch.full((10,), label))
            expected = goodness(second) + goodness(third)
        torch.testing.assert_close(scores[:, label], expected)


def test_inputs_are_numbers():
    network, x, y = transformer(3)
    with pytest.raises(ValueError, match=r"into the inputs, which must be floating-point numbers; got torch.int64"):
        make_rule("ff", network)(x, y)
    with pytest.raises(ValueError, match=r"into the inputs, which must be floating-point numbers; got a dict"):
        make_rule("ff", network)({"x": x}, y)


def test_labels_are_of_samples():
    network, x, y = residual(3)
    with pytest.raises(ValueError, match=r"one label into each input: it takes labels \(B,\); got \(4, 1\)"):
        make_rule("ff", network)(x, y[:, None])


def test_inputs_have_room_for_the_label():
    network = Chain(nn.Linear(2, 6), [nn.Linear(6, 6)], nn.Linear(6, CLASSES))
    with pytest.raises(ValueError, match="an input's first 3 entries; it has 2"):
        make_rule("ff", network)(torch.randn(4, 2), torch.arange(4) % 3)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"contrast": "both"}, "contrast is one of threshold, symmetric; got 'both'"),
        ({"threshold": "1"}, "threshold is a number; got '1'"),
    ],
)
def test_what_cannot_be_is_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_rule("ff", residual(3)[0], **options)
