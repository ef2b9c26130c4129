"""Block-local learning (BLL): a forward network in blocks, and a feedback network that carries the label backwards.

Source: Kappel et al., "Block-local learning with probabilistic latent representations", arXiv 2305.14974; the derivation of
what is minimised here is in docs/bll.md.

The state of block k, z_k, is a latent variable. The *forward message* alpha_k = p(z_k | x) has the block's output,
normalised, as its mean; the *backward message* beta_k(z_k) = p(y | z_k) is proportional to exp(<phi_k(y), z_k>), where the
feedback network carries phi_k(y) = g_k(phi_{k+1}(y)), of which it hands on the direction, from the one-hot label, whatever
the input. Normalised over the labels and taken to first order at the mean of alpha_k, its natural parameters are
phi_k(y) - sum_c p(c | z_k) phi_k(c). They are added to alpha_k's: the posterior rho_k. Block k learns by
KL(rho_k || alpha_k), g_k by -log p(y | z_k), the last block by the label's loss.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hbll.families import FAMILIES, Family, Gaussian, product
from hbll.losses import Loss, cross_entropy
from hbll.names import check_choice, check_number
from hbll.network import Chain
from hbll.rule import StageLoss, Step
from hbll.rules.features import cosines
from hbll.rules.inverted_arcs import inverted_losses
from hbll.rules.local import LocalRule

__all__ = ["BLL"]


class BLL(LocalRule):
    """Block-local learning.

    Args:
        network, stage, loss: as of ``LocalRule``; the stages are the blocks of the source.
        feedback: ``learned`` (each map by the likelihood of the label given its stage's state), ``random`` (as drawn),
            ``prototype`` (the simpler variant: maps straight from the label, see ``prototype_loss``), or ``inverted``
            (no feedback network: the target of a stage is what the next stage inverts its own target to, as in target
            propagation, see ``hbll.rules.inverted_arcs``; needs the next stage's weights, and waits for the forward pass).
        topology: of learned and random feedback: a ``chain`` of maps from stage to stage, or ``direct`` maps from the label.
        family: of the latent variables, whose means the stages hand on: ``gaussian`` or ``bernoulli``.
        variance: of Gaussian ones.
        pixels: states that are images (B, C, H, W) enter the messages averaged over a grid of so many cells a side, so that
            feedback maps stay small; at most as many as the image has.
        iterations: conjugate-gradient iterations of an inverted arc.
    """

    by_itself: ClassVar[bool] = False

    def __init__(
        self,
        network: Chain,
        *,
        stage: int | Sequence[int] = 1,
        feedback: Literal["learned", "random", "prototype", "inverted"] = "learned",
        topology: Literal["chain", "direct"] = "chain",
        family: Literal["gaussian", "bernoulli"] = "gaussian",
        variance: float = 1.0,
        pixels: int = 4,
        iterations: int = 8,
        loss: Loss = cross_entropy,
    ) -> None:
        super().__init__(network, stage=stage, loss=loss)
        check_choice("feedback", feedback, ("learned", "random", "prototype", "inverted"))
        check_choice("topology", topology, ("chain", "direct"))
        check_choice("family", family, ("gaussian", "bernoulli"))
        check_number("variance", variance, above=0)
        check_number("pixels", pixels, least=1)
        check_number("iterations", iterations, least=1)
        if feedback in ("prototype", "inverted") and family != "gaussian":
            raise ValueError(f"{feedback} feedback is for Gaussian states: leave out family")
        self.feedback = feedback
        self.topology = "direct" if feedback == "prototype" else topology
        self.family: Family = Gaussian(variance) if family == "gaussian" else FAMILIES[family]()
        self.variance = variance
        self.pixels = pixels
        self.iterations = iterations
        if feedback != "inverted":
            self.expect(1, last=False)
        if feedback == "random":
            self.beside.requires_grad_(False)

    def made(self, shapes: Sequence[torch.Size], classes: int) -> Sequence[Sequence[nn.Module]]:
        sizes = [self.latent(torch.empty(1, *shape)).shape[1] for shape in shapes[:-1]]
        sources = [*sizes, classes][1:] if self.topology == "chain" else [classes] * len(sizes)
        return [[feedback_map(source, size)] for source, size in zip(sources, sizes, strict=True)]

    def latent(self, state: Tensor) -> Tensor:
        """The mean of a stage's latent variable, (B, features), from its output.

        Gaussian ones are normalised sample by sample to mean 0 and variance 1: a state could else fit any label better by
        growing, and what a residual network knows of the input beside the label would drown.
        """
        if state.ndim == 4:
            rows, columns = state.shape[2:]
            state = F.adaptive_avg_pool2d(state, (min(self.pixels, rows), min(self.pixels, columns)))
        state = state.flatten(1)
        return F.layer_norm(state, state.shape[1:]) if isinstance(self.family, Gaussian) else state

    def messages(self) -> list[Tensor]:
        """phi_k(c) of every class, (C, features), for stages S-1 down to 1: a pass that needs neither inputs nor states.

        Each carries the graph of its own map alone. Maps hand on directions: else a message that has grown would shake those
        of all stages before, whose maps have not seen it come.
        """
        maps = [feedback for k in range(len(self.stages) - 1, 0, -1) for feedback in self.auxiliary(k)]
        if not maps:
            return []
        weight = next(maps[0].parameters())
        labels = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        messages, message = [], labels
        for feedback in maps:
            message = feedback(F.normalize(message.detach()) if self.topology == "chain" else labels)
            messages.append(message)
        return messages

    def losses(self, x: Any, y: Any, step: Step) -> Iterator[StageLoss]:
        if self.feedback == "inverted":
            return inverted_losses(self, x, y, step, Gaussian(self.variance), self.iterations)
        self.build(x)
        messages = self.messages()
        return self.in_order(
            x, y, step, lambda k, rows, classes: self.block_loss(self.latent(rows), messages.pop(), classes)
        )

    def block_loss(self, mean: Tensor, messages: Tensor, y: Tensor) -> Tensor:
        """What a stage and its feedback map learn by, from the mean (B, features) of the forward message and the messages
        (C, features) of all classes."""
        if self.feedback == "prototype":
            return prototype_loss(mean, messages, y)
        scores = mean.detach() @ messages.T
        surprise = cross_entropy(scores, y)[0].mean()
        prior = self.family.natural(mean)
        posterior = product(prior, evidence(scores, messages, y)).detach()
        divergence = self.family.kl(posterior, prior).mean()
        return divergence if self.feedback == "random" else divergence + surprise


def feedback_map(source: int, size: int) -> nn.Linear:
    """A linear map, without bias, that keeps the norm of a message on average."""
    feedback = nn.Linear(source, size, bias=False)
    nn.init.normal_(feedback.weight, std=1 / math.sqrt(size))
    return feedback


def evidence(scores: Tensor, messages: Tensor, y: Tensor) -> Tensor:
    """Natural parameters (B, F) of p(y | z) proportional to exp(<z, messages[y]>), normalised over labels, to first order.

    Args:
        scores: (B, C), <z, messages[c]> at the point of expansion.
        messages: (C, F).
        y: (B,).
    """
    return messages[y] - scores.softmax(1) @ messages


def prototype_loss(z: Tensor, prototypes: Tensor, y: Tensor) -> Tensor:
    """The authors' simpler variant: cross-entropy, correlation and similarity, and the fit of the prototypes.

    The prototypes (C, F) are fitted to normalised activations z (B, F) by squares, which makes them class means. The block
    is to give z the largest product with its own class's prototype (cross-entropy of <z, prototype> / sqrt(F)), to correlate
    with it, and to have between samples the cosines that their prototypes have. How the terms are weighed is not published;
    here equally.
    """
    fixed = prototypes.detach()
    classification = cross_entropy(z @ fixed.T / math.sqrt(z.shape[1]), y)[0].mean()
    own = fixed[y]
    correlation = 1 - F.cosine_similarity(z, own - own.mean(1, keepdim=True)).mean()
    similarity = (cosines(z) - cosines(own)).square().mean()
    return classification + correlation + similarity + F.mse_loss(prototypes[y], z.detach())
