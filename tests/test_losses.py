"""Losses at the label. Oracles: torch's own cross-entropy, torch.distributions."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hbll.losses import counts, cross_entropy, mean_loss, mean_losses, row_means, sample_losses, squared_error
from hbll.rules.local import Labels


def draw(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 6), st.integers(1, 5), st.integers(2, 7), st.integers(0, 1000))
def test_cross_entropy_per_token_is_torchs(batch, tokens, classes, seed):
    logits = draw(seed, batch, tokens, classes)
    y = torch.randint(classes, (batch, tokens), generator=torch.Generator().manual_seed(seed))
    values, counted = cross_entropy(logits, y)
    assert values.shape == y.shape
    assert counted.all()
    torch.testing.assert_close(values, F.cross_entropy(logits.transpose(1, 2), y, reduction="none"))
    torch.testing.assert_close(values, -torch.distributions.Categorical(logits=logits).log_prob(y))


def test_cross_entropy_per_sample_is_torchs():
    logits, y = draw(0, 6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    values, counted = cross_entropy(logits, y)
    torch.testing.assert_close(values, F.cross_entropy(logits, y, reduction="none"))
    assert counted.all()


def test_ignored_labels_weigh_nothing():
    logits = draw(1, 3, 5, 4)
    y = torch.randint(4, (3, 5), generator=torch.Generator().manual_seed(0))
    y[0, 1:] = -100
    y[2] = -100
    values, counted = cross_entropy(logits, y)
    assert torch.equal(counted.bool(), y != -100)
    torch.testing.assert_close(
        (values * counted).sum() / counted.sum(), F.cross_entropy(logits.flatten(0, 1), y.flatten())
    )


def test_strided_labels_and_logits():
    logits, y = draw(2, 4, 5, 3), torch.randint(3, (5, 4), generator=torch.Generator().manual_seed(1))
    strided = logits.transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(cross_entropy(strided, y.T)[0], cross_entropy(logits, y.T.contiguous())[0])


@pytest.mark.parametrize("label", [4, -1, 100])
def test_labels_outside_the_classes(label):
    with pytest.raises(ValueError, match=r"classes 0\.\.3"):
        cross_entropy(draw(0, 2, 4), torch.tensor([0, label]))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32])
def test_classes_of_any_integers(dtype):
    logits, y = draw(0, 2, 4), torch.tensor([0, 1])
    for found, expected in zip(cross_entropy(logits, y.to(dtype)), cross_entropy(logits, y), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_byte_that_looks_like_no_label_is_one():
    logits, y = draw(0, 2, 256), torch.tensor([156, 3])  # -100 is 156 modulo 256
    byte = y.to(torch.uint8)
    torch.testing.assert_close(mean_loss(cross_entropy, logits, byte), F.cross_entropy(logits, y))
    assert counts(cross_entropy, byte[:1])
    assert len(Labels(byte)) == 2


@pytest.mark.parametrize("loss", [cross_entropy, squared_error])
def test_what_is_not_one_tensor_is_named(loss):
    with pytest.raises(ValueError, match="the head returns a dict, and this loss takes one tensor"):
        loss({"logits": draw(0, 2, 4)}, torch.tensor([0, 1]))


def test_squared_error_is_a_gaussian_likelihood_up_to_a_constant():
    prediction, y = draw(0, 5, 3), draw(1, 5, 3)
    log_prob = torch.distributions.Independent(torch.distributions.Normal(prediction, 1.0), 1).log_prob(y)
    constant = 3 * torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64)) / 2
    torch.testing.assert_close(squared_error(prediction, y), -log_prob - constant)
    assert squared_error(draw(2, 5, 7, 3), draw(3, 5, 7, 3)).shape == (5, 7)


def test_means_of_rows_leave_out_what_weighs_nothing():
    values, weights = draw(0, 6, 5), torch.tensor([0.0, 1.0, 2.0, 1.0, 0.0], dtype=torch.float64).repeat(6, 1)
    weights[4:] = 0  # of the last row nothing counts
    means = row_means(values, weights, 3)
    for row in range(2):
        mine, own = values[2 * row : 2 * row + 2], weights[2 * row : 2 * row + 2]
        torch.testing.assert_close(means[row], (mine * own).sum() / own.sum())
    assert means[2] == 0


@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 100))
def test_mean_losses_are_each_rows_own(rows, tokens, seed):
    logits = draw(seed, rows, 4, tokens, 3).requires_grad_()
    y = torch.randint(-1, 3, (rows, 4, tokens), generator=torch.Generator().manual_seed(seed))
    y[y < 0] = -100
    y[:, 0, 0] = 1
    found, _ = mean_losses(cross_entropy, logits, y)
    own = [F.cross_entropy(logits[i].flatten(0, 1), y[i].flatten()) for i in range(rows)]
    torch.testing.assert_close(found, torch.stack(own))
    torch.testing.assert_close(mean_loss(cross_entropy, logits[0], y[0]), own[0])
    torch.testing.assert_close(
        torch.autograd.grad(found.sum(), logits)[0], torch.autograd.grad(torch.stack(own).sum(), logits)[0]
    )


def test_rows_reach_the_loss_as_one_batch():
    seen = []

    def loss(prediction, y):
        seen.append((prediction.shape, y.shape))
        return squared_error(prediction, y)

    prediction, y = draw(0, 2, 4, 7, 3), draw(1, 2, 4, 7, 3)
    means, _ = mean_losses(loss, prediction, y)
    assert seen == [((8, 7, 3), (8, 7, 3))]
    torch.testing.assert_close(means, (prediction - y).square().sum(-1).mean((1, 2)) / 2)


def test_a_loss_of_one_value_per_sample_weighs_all_alike():
    prediction, y = draw(0, 5, 3), draw(1, 5, 3)
    values, weights = sample_losses(squared_error, prediction, y)
    assert (weights == 1).all()
    torch.testing.assert_close(mean_loss(squared_error, prediction, y), values.mean())


@pytest.mark.parametrize("options", [{}, {"ignore_index": 2}, {"label_smoothing": 0.1}])
@pytest.mark.parametrize("weights", [None, [0.1, 0.2, 0.05, 0.0]])
@pytest.mark.parametrize("made", [nn.CrossEntropyLoss, nn.NLLLoss])
def test_torchs_losses_of_classes_have_torchs_mean(made, weights, options):
    if "label_smoothing" in options and (made is nn.NLLLoss or weights):
        pytest.skip("which has none, or gives labels of weight 0 some of others'")
    torch.manual_seed(0)
    options = options | ({} if weights is None else {"weight": torch.tensor(weights, dtype=torch.float64)})
    logits = torch.randn(12, 4, dtype=torch.float64, requires_grad=True)
    scores, y = logits.log_softmax(1), torch.randint(4, (12,))
    y[:3] = options.get("ignore_index", -100)
    found = mean_loss(made(reduction="none", **options), scores, y)
    expected = made(**options)(scores, y)
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found, logits, retain_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])


def test_a_batch_of_ignored_labels_counts_for_nothing_by_torchs_losses_too():
    y = torch.full((3,), 2)
    assert not counts(nn.CrossEntropyLoss(reduction="none", ignore_index=2), y)
    assert counts(nn.NLLLoss(reduction="none"), y)
    assert counts(nn.CrossEntropyLoss(reduction="none"), torch.rand(3, 2)) is None


def test_bytes_are_labels_of_torchs_losses():
    scores, y = torch.randn(4, 200), torch.tensor([156, 0, 3, 199], dtype=torch.uint8)
    for weight in (None, torch.rand(200)):
        found = mean_loss(nn.CrossEntropyLoss(weight, reduction="none"), scores, y)
        torch.testing.assert_close(found, F.cross_entropy(scores, y.long(), weight))


def test_probabilities_of_classes_are_labels_too():
    scores, y = torch.randn(6, 3), torch.rand(6, 3).softmax(1)
    torch.testing.assert_close(mean_loss(nn.CrossEntropyLoss(reduction="none"), scores, y), F.cross_entropy(scores, y))


def test_a_loss_that_broadcasts_labels_is_refused():
    with pytest.raises(
        ValueError, match=r"values \(16, 16\) for labels \(16,\): it is to return one per sample or token"
    ):
        mean_loss(lambda z, y: (z - y).square(), torch.randn(16, 1), torch.randn(16))


def test_a_loss_that_averages_over_the_batch_is_refused():
    with pytest.raises(ValueError, match=r"one value per sample, not their mean: .* reduction='none'"):
        sample_losses(F.cross_entropy, draw(0, 5, 3), torch.zeros(5, dtype=torch.long))


@pytest.mark.parametrize(
    "labels",
    [torch.zeros(2, 3, dtype=int), torch.zeros(6, dtype=int), torch.zeros(3, 2), torch.zeros(3, 1, dtype=int), None],
)
def test_labels_are_one_class_for_each_token(labels):
    with pytest.raises(ValueError, match=r"take integer labels \(3, 2\)"):
        cross_entropy(torch.zeros(3, 2, 5), labels)


def test_scores_of_pixels_are_told_where_classes_go():
    with pytest.raises(
        ValueError, match=r"got \(2, 4, 5\) of torch.int64; let the head have classes last, or give loss=nn"
    ):
        cross_entropy(torch.randn(2, 3, 4, 5), torch.zeros(2, 4, 5, dtype=torch.long))


def test_squares_are_not_broadcast():
    with pytest.raises(ValueError, match="of that shape"):
        squared_error(torch.zeros(4, 1), torch.zeros(4))
