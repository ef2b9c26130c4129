"""Exponential families. Oracles: torch.distributions, autograd, enumeration and numerical integration, in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributions as D

from hbll.families import FAMILIES, Bernoulli, Categorical, Gaussian, product

FEATURES = 4
VARIANCE = 0.7
FAMILY = {
    "gaussian": Gaussian(VARIANCE),
    "bernoulli": Bernoulli(),
    "categorical": Categorical(),
}
every_family = pytest.mark.parametrize("name", FAMILY)
SEEDS = st.integers(0, 10_000)


def naturals(seed, *shape):
    return 2 * torch.randn(*shape, FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def distribution(name, natural):
    """The same member in torch.distributions, over whole feature vectors."""
    if name == "gaussian":
        return D.Independent(D.Normal(natural * VARIANCE, VARIANCE**0.5), 1)
    if name == "bernoulli":
        return D.Independent(D.Bernoulli(logits=natural), 1)
    return D.OneHotCategorical(logits=natural)


def support(name):
    """Every value of a discrete family, (values, features)."""
    if name == "bernoulli":
        return torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * FEATURES)
    return torch.eye(FEATURES, dtype=torch.float64)


def test_registry_holds_the_families_by_name():
    assert {name: type(family) for name, family in FAMILY.items()} == FAMILIES


@every_family
@given(seed=SEEDS)
def test_mean_is_that_of_torch_distributions(name, seed):
    natural = naturals(seed, 3)
    torch.testing.assert_close(FAMILY[name].mean(natural), distribution(name, natural).mean)


@every_family
@given(seed=SEEDS)
def test_natural_inverts_mean(name, seed):
    natural = naturals(seed, 3)
    again = FAMILY[name].natural(FAMILY[name].mean(natural))
    if name == "categorical":  # natural parameters are known up to a constant
        again, natural = again.log_softmax(-1), natural.log_softmax(-1)
    torch.testing.assert_close(again, natural)


@every_family
@given(seed=SEEDS)
def test_kl_is_that_of_torch_distributions(name, seed):
    first, second = naturals(seed, 3), naturals(seed + 1, 3)
    expected = D.kl_divergence(distribution(name, first), distribution(name, second))
    torch.testing.assert_close(FAMILY[name].kl(first, second), expected)


@every_family
@given(seed=SEEDS)
def test_kl_is_the_bregman_divergence_of_the_log_partition(name, seed):
    family, first, second = FAMILY[name], naturals(seed, 3), naturals(seed + 1, 3)
    slope = (family.mean(first) * (first - second)).sum(-1)
    expected = family.log_partition(second) - family.log_partition(first) + slope
    torch.testing.assert_close(family.kl(first, second), expected)


@every_family
@given(seed=SEEDS)
def test_kl_is_positive_and_zero_only_with_itself(name, seed):
    first, second = naturals(seed, 3), naturals(seed + 1, 3)
    assert (FAMILY[name].kl(first, second) > 0).all()
    torch.testing.assert_close(FAMILY[name].kl(first, first), torch.zeros(3, dtype=torch.float64))


@every_family
@given(seed=SEEDS)
def test_gradient_of_the_log_partition_is_the_mean(name, seed):
    natural = naturals(seed, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(FAMILY[name].log_partition(natural).sum(), natural)
    torch.testing.assert_close(gradient, FAMILY[name].mean(natural.detach()))


@pytest.mark.parametrize("name", ["bernoulli", "categorical"])
def test_log_partition_normalises_the_density(name):
    natural = naturals(0)
    expected = (support(name) @ natural).exp().sum().log()  # h = 1 on the support
    torch.testing.assert_close(FAMILY[name].log_partition(natural), expected)


def test_log_partition_normalises_the_gaussian():
    # exp(A) = integral of h(z) exp(phi z), h the density of N(0, sigma^2)
    z = torch.linspace(-30, 30, 200_001, dtype=torch.float64)
    h = D.Normal(torch.tensor(0.0, dtype=torch.float64), VARIANCE**0.5).log_prob(z).exp()
    for phi in (-1.5, 0.0, 0.4, 2.0):
        expected = torch.trapezoid(h * torch.exp(phi * z), z).log()
        actual = FAMILY["gaussian"].log_partition(torch.tensor([phi], dtype=torch.float64))
        torch.testing.assert_close(actual, expected)


@every_family
def test_log_density_is_that_of_torch_distributions(name):
    natural = naturals(3)
    if name == "gaussian":
        values = naturals(4, 5)
        h = D.Independent(D.Normal(torch.zeros(FEATURES, dtype=torch.float64), VARIANCE**0.5), 1).log_prob(values)
    else:
        values = support(name)
        h = torch.zeros(len(values), dtype=torch.float64)
    actual = h + values @ natural - FAMILY[name].log_partition(natural)
    torch.testing.assert_close(actual, distribution(name, natural.expand(len(values), -1)).log_prob(values))


@pytest.mark.parametrize("name", ["bernoulli", "categorical"])
@given(seed=SEEDS)
def test_product_is_the_normalised_product_of_probabilities(name, seed):
    first, second, values = naturals(seed), naturals(seed + 1), support(name)
    joint = (distribution(name, first).log_prob(values) + distribution(name, second).log_prob(values)).softmax(0)
    actual = distribution(name, product(first, second)).log_prob(values).exp()
    torch.testing.assert_close(actual, joint)


@pytest.mark.parametrize(("first", "second"), [(0.3, -0.8), (1.2, 0.9), (0.0, 0.5)])
def test_product_of_gaussians_relative_to_the_base_measure(first, second):
    # p q / h, normalised by numerical integration: its mean and variance are those of the member phi_p + phi_q.
    family = FAMILY["gaussian"]
    z = torch.linspace(-25, 25, 100_001, dtype=torch.float64)

    def density(phi):
        return D.Normal(torch.tensor(phi * VARIANCE, dtype=torch.float64), VARIANCE**0.5).log_prob(z)

    log_joint = density(first) + density(second) - density(0.0)
    joint = log_joint.exp() / torch.trapezoid(log_joint.exp(), z)
    both = product(torch.tensor([first], dtype=torch.float64), torch.tensor([second], dtype=torch.float64))
    mean = torch.trapezoid(joint * z, z)
    torch.testing.assert_close(family.mean(both), mean.view(1))
    torch.testing.assert_close(torch.trapezoid(joint * (z - mean) ** 2, z).item(), VARIANCE)
    torch.testing.assert_close(joint, density(first + second).exp())


@every_family
@given(seed=SEEDS)
def test_shift_and_divergence_take_means(name, seed):
    family = FAMILY[name]
    first, second, amount = naturals(seed, 3), naturals(seed + 1, 3), naturals(seed + 2, 3)
    torch.testing.assert_close(family.shift(family.mean(first), amount), family.mean(first + amount))
    actual = family.divergence(family.mean(first), family.mean(second))
    torch.testing.assert_close(actual, family.kl(first, second))


@every_family
@pytest.mark.parametrize("dim", [-4, -3, -2, -1, 1, 2])
def test_features_may_lie_along_any_dimension(name, dim):
    last = FAMILY[name]
    other = Gaussian(VARIANCE, dim=dim) if name == "gaussian" else type(last)(dim=dim)
    first, second = naturals(5, 2, 3, 5), naturals(6, 2, 3, 5)
    moved_first, moved_second = first.movedim(-1, dim), second.movedim(-1, dim)
    torch.testing.assert_close(other.mean(moved_first), last.mean(first).movedim(-1, dim))
    torch.testing.assert_close(other.log_partition(moved_first), last.log_partition(first))
    torch.testing.assert_close(other.kl(moved_first, moved_second), last.kl(first, second))
    means = other.mean(moved_first), other.mean(moved_second)
    torch.testing.assert_close(other.divergence(*means), last.kl(first, second))
    draw = other.sample(moved_first)
    assert draw.shape == moved_first.shape
    if name == "categorical":
        torch.testing.assert_close(draw.sum(dim), torch.ones_like(draw.sum(dim)))


@every_family
def test_samples_have_the_mean_and_the_variance(name):
    count = 40_000
    natural = naturals(7) / 2
    draws = FAMILY[name].sample(natural.expand(count, FEATURES), torch.Generator().manual_seed(0))
    mean = distribution(name, natural).mean
    variance = torch.full((FEATURES,), VARIANCE, dtype=torch.float64) if name == "gaussian" else mean * (1 - mean)
    # Five standard errors.
    assert ((draws.mean(0) - mean).abs() < 5 * (variance / count).sqrt()).all()
    torch.testing.assert_close(draws.var(0), variance, rtol=0.1, atol=0.01)
    # Features are independent but for the categorical, whose covariance is -p_i p_j.
    expected = torch.diag(variance)
    if name == "categorical":
        expected = expected - torch.outer(mean, mean) * (1 - torch.eye(FEATURES))
    torch.testing.assert_close(torch.cov(draws.T), expected, rtol=0.1, atol=0.02)


@every_family
@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5)])
def test_samples_of_any_shape(name, shape):
    draw = FAMILY[name].sample(torch.zeros(shape))
    assert draw.shape == shape
    if name == "categorical":
        assert (draw.sum(-1) == 1).all()


@every_family
def test_samples_follow_the_generator(name):
    natural = naturals(8, 50)
    draw = FAMILY[name].sample(natural, torch.Generator().manual_seed(3))
    torch.testing.assert_close(FAMILY[name].sample(natural, torch.Generator().manual_seed(3)), draw, rtol=0, atol=0)
    assert not torch.equal(FAMILY[name].sample(natural, torch.Generator().manual_seed(4)), draw)
    assert draw.dtype == natural.dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["bernoulli", "categorical"])
def test_saturated_means_stay_finite(name, dtype):
    family = FAMILY[name]
    saturated = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=dtype)
    other = torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=dtype)
    for value in (
        family.natural(saturated),
        family.divergence(saturated, other),
        family.divergence(saturated, saturated),
        family.shift(saturated, torch.full((4,), 0.5, dtype=dtype)),
    ):
        assert torch.isfinite(value).all()
    mean = saturated.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(family.divergence(other, mean), mean)
    assert torch.isfinite(gradient).all()


def test_the_bernoulli_divergence_of_the_specification():
    target, prior = naturals(9).sigmoid(), naturals(10).sigmoid()
    expected = torch.log((1 - target) / (1 - prior))
    expected = expected + target * torch.log(target * (1 - prior) / (prior * (1 - target)))
    torch.testing.assert_close(Bernoulli().divergence(target, prior), expected.sum())


def test_the_gaussian_divergence_is_the_squared_distance():
    first, second = naturals(11, 3), naturals(12, 3)
    expected = (first - second).pow(2).sum(-1) / (2 * VARIANCE)
    torch.testing.assert_close(FAMILY["gaussian"].divergence(first, second), expected)
    assert math.isclose(Gaussian().variance, 1.0)
