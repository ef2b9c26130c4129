"""Similarity matching and prediction. Oracles: the paper's formulas, sample by sample, and the loss by its parts."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tests.networks import CLASSES, residual
from torch import nn

from hbll import Chain, Step
from hbll.models.vgg import vgg8b
from hbll.rules import make_rule
from hbll.rules.predsim import similarity_loss, similarity_matrix


def cosine_by_loop(vectors):
    rows = [[float(x) - sum(map(float, v)) / len(v) for x in v] for v in vectors]
    norm = [math.sqrt(sum(x * x for x in row)) for row in rows]
    return [[sum(a * b for a, b in zip(p, q, strict=True)) / m / n for q, n in zip(rows, norm, strict=True)]
            for p, m in zip(rows, norm, strict=True)]  # fmt: skip


def deviation_by_loop(maps):
    """The standard deviation of every map of one sample."""
    found = []
    for values in maps.flatten(1).tolist():
        mean = sum(values) / len(values)
        found.append(math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)))
    return found


def test_the_similarity_of_vectors():
    states = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.tensor(cosine_by_loop(states.tolist()), dtype=torch.float64)
    torch.testing.assert_close(similarity_matrix(states), expected)


def test_feature_maps_count_by_their_standard_deviation_and_tokens_alike():
    maps = torch.randn(4, 6, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.tensor(cosine_by_loop([deviation_by_loop(sample) for sample in maps]), dtype=torch.float64)
    torch.testing.assert_close(similarity_matrix(maps), expected)
    torch.testing.assert_close(similarity_matrix(maps.flatten(2).mT), expected)


def test_a_map_of_one_pixel_counts_as_it_is():
    maps = torch.randn(4, 6, 1, 1)
    torch.testing.assert_close(similarity_matrix(maps), similarity_matrix(maps.flatten(1)))


@given(st.integers(0, 2**20), st.integers(2, 6), st.floats(0.1, 10))
def test_scale_and_offset_of_a_sample_do_not_matter(seed, batch, scale):
    states = torch.randn(batch, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    matrix = similarity_matrix(states)
    torch.testing.assert_close(matrix.diagonal(), torch.ones(batch, dtype=torch.float64))
    torch.testing.assert_close(matrix, matrix.mT)
    torch.testing.assert_close(similarity_matrix(scale * states + 3), matrix)


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_one_hot_states_have_no_loss(classes):
    y = torch.randint(classes, (20,), generator=torch.Generator().manual_seed(0))
    one_hot = F.one_hot(y, classes).double()
    assert similarity_loss(one_hot, y, classes).item() < 1e-20


def test_the_loss_by_loop():
    states = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1, 1, 3, 0])
    ours, wanted = cosine_by_loop(states.tolist()), cosine_by_loop(F.one_hot(y, 4).tolist())
    errors = [(a - b) ** 2 for row, other in zip(ours, wanted, strict=True) for a, b in zip(row, other, strict=True)]
    assert similarity_loss(states, y, 4).item() == pytest.approx(sum(errors) / 25)


def test_dead_features_have_a_finite_gradient():
    states = torch.zeros(3, 4, 2, 2, requires_grad=True)
    similarity_loss(states, torch.tensor([0, 1, 0]), 2).backward()
    assert states.grad.isfinite().all()


def test_the_losses_by_their_parts():
    torch.manual_seed(0)
    *layers, head = vgg8b(16, width=2, channels=2, classes=CLASSES, dropout=0.0)
    network = Chain(nn.Identity(), layers, head).double()
    x, y = torch.randn(6, 2, 16, 16, dtype=torch.float64), torch.randint(3, (6,))
    rule = make_rule("predsim", network, example=x, beta=0.7, pooled=64)
    with torch.no_grad():
        for p in rule.beside.parameters():
            p.copy_(torch.randn_like(p))
    step, state = Step(), x
    *losses, at_head = [(loss.stage, loss.value) for loss in rule.losses(x, y, step)]
    assert [k for k, _ in losses] == list(range(1, len(layers) + 1))
    for k, loss in losses:
        state = network.blocks[k - 1](state)
        match, predict = rule.auxiliary(k)
        pooled = state
        while pooled.ndim == 4 and pooled[0].numel() > 64:  # sides are halved in turn, height first
            pooled = F.avg_pool2d(pooled, (2, 1) if pooled.shape[2] >= pooled.shape[3] else (1, 2))
        prediction = pooled.flatten(1) @ predict[-1].weight.mT + predict[-1].bias
        matched = F.conv2d(state, match.weight, padding=1) if state.ndim == 4 else state @ match.weight.mT
        torch.testing.assert_close(loss, 0.7 * similarity_loss(matched, y, 3) + 0.3 * F.cross_entropy(prediction, y))
    error = F.cross_entropy(head(state), y)
    torch.testing.assert_close(at_head[1], 0.3 * error)
    torch.testing.assert_close(step.label_loss, error)


def test_predictors_know_nothing_at_first():
    network, x, y = residual(4)
    rule = make_rule("predsim", network, example=x, beta=0.0)
    reports = rule(x, y).reports
    for k, report in reports.items():
        bias = rule.auxiliary(k)[1][-1].bias
        assert report.error == pytest.approx(math.log(CLASSES), abs=2 * bias.abs().max().item())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"beta": 1.5}, "beta is a share, from 0 to 1; got 1.5"),
        ({"beta": "much"}, "beta is a number; got 'much'"),
        ({"pooled": 0}, "pooled must be at least 1; got 0"),
    ],
)
def test_what_cannot_be_is_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_rule("predsim", residual(3)[0], **options)
