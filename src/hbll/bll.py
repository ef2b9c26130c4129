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
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hbll.families import FAMILIES, Family, Gaussian, product
from hbll.local.features import cosines
from hbll.local.inverted_arcs import inverted_step
from hbll.local.rule import Blocks, LocalRule, LocalStep, detached_pass, local_cost
from hbll.losses import mean_loss
from hbll.names import check_known

__all__ = ["BLL"]

FEEDBACK = ("learned", "random", "prototype", "inverted")


class BLL(LocalRule):
    """Block-local learning.

    Args:
        feedback: ``learned`` (each map by the likelihood of the label given its block's state), ``random`` (as drawn),
            ``prototype`` (the simpler variant: maps straight from the label, see ``prototype_loss``), or ``inverted``
            (no feedback network: the target of a block is what the next block inverts its own target to, as in target
            propagation, see ``hbll.local.inverted_arcs``; needs the next block's weights, and waits for the forward pass).
        topology: of learned and random feedback: a ``chain`` of maps from block to block, or ``direct`` maps from the label.
        family: of the latent variables, whose means the blocks hand on: ``gaussian`` or ``bernoulli``.
        variance: of Gaussian ones.
        pixels: states that are images (B, C, H, W) enter the messages averaged over a grid of so many cells a side, so that
            feedback maps stay small; at most as many as the image has.
        iterations: conjugate-gradient iterations of an inverted arc.
        options: of ``LocalRule``.
    """

    def __init__(
        self,
        feedback: Literal["learned", "random", "prototype", "inverted"] = "learned",
        topology: Literal["chain", "direct"] = "chain",
        family: Literal["gaussian", "bernoulli"] = "gaussian",
        variance: float = 1.0,
        pixels: int = 4,
        iterations: int = 8,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_known(feedback, FEEDBACK, "feedback")
        check_known(topology, ("chain", "direct"), "topology")
        check_known(family, ("gaussian", "bernoulli"), "family")
        if feedback in ("prototype", "inverted") and family != "gaussian":
            raise ValueError(f"{feedback} feedback is for Gaussian states: leave out family")
        self.feedback = feedback
        self.topology = "direct" if feedback == "prototype" else topology
        self.family: Family = Gaussian(variance) if family == "gaussian" else FAMILIES[family]()
        self.pixels = pixels
        self.iterations = iterations
        self.variance = variance
        self.maps = nn.ModuleList()
        self.labels: Tensor

    def build(self, shapes: Sequence[torch.Size], classes: int) -> None:
        if self.feedback == "inverted":
            return
        sizes = [self.latent(torch.empty(1, *shape)).shape[1] for shape in shapes[:-1]]
        sources = [*sizes, classes][1:] if self.topology == "chain" else [classes] * len(sizes)
        self.maps = nn.ModuleList(map(feedback_map, sources, sizes))
        self.maps.requires_grad_(self.feedback != "random")
        self.register_buffer("labels", torch.eye(classes), persistent=False)

    def latent(self, state: Tensor) -> Tensor:
        """The mean of a block's latent variable, (B, features), from its output.

        Gaussian ones are normalised sample by sample to mean 0 and variance 1: a state could else fit any label better by
        growing, and what a residual network knows of the input beside the label would drown.
        """
        if state.ndim == 4:
            rows, columns = state.shape[2:]
            state = F.adaptive_avg_pool2d(state, (min(self.pixels, rows), min(self.pixels, columns)))
        state = state.flatten(1)
        return F.layer_norm(state, state.shape[1:]) if isinstance(self.family, Gaussian) else state

    def messages(self) -> list[Tensor]:
        """phi_k(c) of every class, (C, features), for blocks 1..K-1: a pass that needs neither inputs nor states.

        Each carries the graph of its own map alone. Maps hand on directions: else a message that has grown would shake those
        of all blocks before, whose maps have not seen it come.
        """
        messages, message = [], self.labels
        for feedback in reversed(self.maps):
            message = feedback(F.normalize(message.detach()) if self.topology == "chain" else self.labels)
            messages.append(message)
        return messages[::-1]

    def auxiliary(self, k: int) -> list[nn.Module]:
        return [self.maps[k - 1]] if k <= len(self.maps) else []

    def step(self, blocks: Blocks, x: Tensor, y: Tensor) -> LocalStep:
        if self.feedback == "inverted":
            return inverted_step(blocks, x, y, self.loss, Gaussian(self.variance), self.iterations)
        *hidden, last = detached_pass(blocks.segments, x)
        at_label = mean_loss(self.loss, blocks.head.module(last), y)
        pairs = zip(map(self.latent, hidden), self.messages(), strict=True)
        losses = [self.block_loss(mean, messages, y) for mean, messages in pairs]
        return LocalStep([*losses, at_label], *local_cost(blocks.segments))

    def block_loss(self, mean: Tensor, messages: Tensor, y: Tensor) -> Tensor:
        """What block and feedback map learn by, from the mean of the forward message and the messages of all classes."""
        if self.feedback == "prototype":
            return prototype_loss(mean, messages, y)
        scores = mean.detach() @ messages.T
        prior = self.family.natural(mean)
        posterior = product(prior, evidence(scores, messages, y)).detach()
        divergence = self.family.kl(posterior, prior).mean()
        return divergence if self.feedback == "random" else divergence + F.cross_entropy(scores, y)


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
    own = fixed[y]
    classification = F.cross_entropy(z @ fixed.T / math.sqrt(z.shape[1]), y)
    correlation = 1 - F.cosine_similarity(z, own - own.mean(1, keepdim=True)).mean()
    similarity = (cosines(z) - cosines(own)).square().mean()
    return classification + correlation + similarity + F.mse_loss(prototypes[y], z.detach())
