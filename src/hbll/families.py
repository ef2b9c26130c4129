"""Exponential families over the states: natural parameters, means, log-partition, KL divergence, product, sampling.

Blocks exchange *mean* parameters (a sigmoid layer's output is the mean of a Bernoulli). A family translates between means
and natural parameters; in natural parameters the product of two densities is a sum, which is how evidence from the right
corrects a prior. Densities are p(z) = h(z) exp(<phi, z> - A(phi)) (arXiv 2606.21497, section 3; arXiv 2305.14974).
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["FAMILIES", "Bernoulli", "Categorical", "Family", "Gaussian", "product"]


def product(first: Tensor, second: Tensor) -> Tensor:
    """Natural parameters of the normalised product of two members of one family, taken relative to h: phi_1 + phi_2."""
    return first + second


class Family(ABC):
    """An exponential family over the features of a state: the entries along one dimension of a tensor of any shape.

    Args:
        dim: the dimension that holds the features; sums over features remove it.
    """

    def __init__(self, dim: int = -1) -> None:
        self.dim = dim

    @abstractmethod
    def natural(self, mean: Tensor) -> Tensor:
        """Natural parameters phi of the member with this mean; same shape."""

    @abstractmethod
    def mean(self, natural: Tensor) -> Tensor:
        """Mean parameters, the gradient of the log-partition; same shape."""

    @abstractmethod
    def log_partition(self, natural: Tensor) -> Tensor:
        """A(phi), summed over the features."""

    @abstractmethod
    def kl(self, first: Tensor, second: Tensor) -> Tensor:
        """KL(first || second) of two members given by natural parameters, summed over the features, in nats."""

    @abstractmethod
    def sample(self, natural: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One draw; same shape."""

    def shift(self, mean: Tensor, amount: Tensor) -> Tensor:
        """The mean after ``amount`` is added to the natural parameters."""
        return self.mean(product(self.natural(mean), amount))

    def divergence(self, first: Tensor, second: Tensor) -> Tensor:
        """KL(first || second) of two members given by their means, summed over the features, in nats."""
        return self.kl(self.natural(first), self.natural(second))


class Gaussian(Family):
    """Gaussian with known variance sigma^2 in every feature; phi = mean / sigma^2."""

    def __init__(self, variance: float = 1.0, dim: int = -1) -> None:
        super().__init__(dim)
        self.variance = variance

    def natural(self, mean: Tensor) -> Tensor:
        return mean / self.variance

    def mean(self, natural: Tensor) -> Tensor:
        return natural * self.variance

    def log_partition(self, natural: Tensor) -> Tensor:
        return self.variance / 2 * natural.square().sum(self.dim)

    def kl(self, first: Tensor, second: Tensor) -> Tensor:
        return self.variance / 2 * (first - second).square().sum(self.dim)

    def sample(self, natural: Tensor, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.randn(natural.shape, generator=generator, dtype=natural.dtype, device=natural.device)
        return self.mean(natural) + self.variance**0.5 * noise

    # The two below are the general ones without the round trip through natural parameters, which costs rounding and time.
    def shift(self, mean: Tensor, amount: Tensor) -> Tensor:
        return torch.add(mean, amount, alpha=self.variance)

    def divergence(self, first: Tensor, second: Tensor) -> Tensor:
        return (first - second).square().sum(self.dim) / (2 * self.variance)


class Bernoulli(Family):
    """Independent Bernoulli features; phi = logit of the mean."""

    def natural(self, mean: Tensor) -> Tensor:
        # A saturated sigmoid rounds to 0 or 1, whose logit is infinite: keep one rounding unit away.
        return torch.logit(mean, eps=torch.finfo(mean.dtype).eps)

    def mean(self, natural: Tensor) -> Tensor:
        return torch.sigmoid(natural)

    def log_partition(self, natural: Tensor) -> Tensor:
        return F.softplus(natural).sum(self.dim)

    def kl(self, first: Tensor, second: Tensor) -> Tensor:
        difference = first - second
        return (torch.sigmoid(first) * difference - F.softplus(first) + F.softplus(second)).sum(self.dim)

    def sample(self, natural: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.bernoulli(torch.sigmoid(natural), generator=generator)


class Categorical(Family):
    """One categorical variable over the features; phi = log of the mean up to a constant (logits)."""

    def natural(self, mean: Tensor) -> Tensor:
        return mean.clamp_min(torch.finfo(mean.dtype).tiny).log()

    def mean(self, natural: Tensor) -> Tensor:
        return natural.softmax(self.dim)

    def log_partition(self, natural: Tensor) -> Tensor:
        return natural.logsumexp(self.dim)

    def kl(self, first: Tensor, second: Tensor) -> Tensor:
        log_first, log_second = first.log_softmax(self.dim), second.log_softmax(self.dim)
        return (log_first.exp() * (log_first - log_second)).sum(self.dim)

    def sample(self, natural: Tensor, generator: torch.Generator | None = None) -> Tensor:
        probabilities = natural.movedim(self.dim, -1).softmax(-1)
        rows = probabilities.reshape(-1, probabilities.shape[-1])
        draws = torch.multinomial(rows, 1, generator=generator)
        one_hot = torch.zeros_like(rows).scatter_(-1, draws, 1.0)
        return one_hot.reshape(probabilities.shape).movedim(-1, self.dim)


FAMILIES = {"gaussian": Gaussian, "bernoulli": Bernoulli, "categorical": Categorical}
"""The families by the names that training rules use."""
