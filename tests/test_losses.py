"""Losses at the label. Oracles: torch's own cross-entropy, torch.distributions."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from hbll.losses import cross_entropy, squared_error


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


def test_squared_error_is_a_gaussian_likelihood_up_to_a_constant():
    prediction, y = draw(0, 5, 3), draw(1, 5, 3)
    log_prob = torch.distributions.Independent(torch.distributions.Normal(prediction, 1.0), 1).log_prob(y)
    constant = 3 * torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64)) / 2
    torch.testing.assert_close(squared_error(prediction, y), -log_prob - constant)
    assert squared_error(draw(2, 5, 7, 3), draw(3, 5, 7, 3)).shape == (5, 7)
