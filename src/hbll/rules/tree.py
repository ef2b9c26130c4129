"""HBLL: states by the tree, credit by inverted right arcs (arXiv 2606.21497, section 3).

Level by level, every node evaluates its block on its left parent's state (the prior), lets its right neighbour's block
predict the right parent's target from it, and moves along that error's gradient to a target (the posterior mean).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hbll.calls import check_shape, out_of_order
from hbll.engine import Evaluation, stack
from hbll.families import FAMILIES, Family, Gaussian
from hbll.inversion import gauss_newton, taylor
from hbll.losses import Loss, counts, cross_entropy, row_means, sample_losses, wide
from hbll.modes import still_statistics
from hbll.names import check_choice, check_number
from hbll.network import Chain
from hbll.rule import StageLoss, Step, attach_gradients
from hbll.rules.composed import (
    Batch,
    Composed,
    Credit,
    Cut,
    EngineChoice,
    Front,
    States,
    Target,
    Targets,
    Walk,
    count_walks,
    per_sample,
)

__all__ = ["ArcCredit", "Paper", "Tree", "TreeStates"]

Scope = Literal["block", "triplet", "tree"]


class TreeStates(States):
    """Level by level, every block on its left parent: log2 N sequential calls.

    The boundary that children see is the *posterior* (the target, which contains the label: the paper) or the *prior*
    (what the block computed: what the deployed network will see).

    Args:
        boundary: ``posterior`` or ``prior``.
        carry_gradient: whether boundaries carry the graph of what they were computed from.
    """

    embed_read_once = False

    def __init__(self, boundary: Literal["posterior", "prior"], carry_gradient: bool) -> None:
        super().__init__()
        self.posterior = boundary == "posterior"
        self.graphs_meet = carry_gradient

    def fronts(self, cut: Cut, batch: Batch | None, targets: Targets, step: Step) -> Iterator[Front]:
        assert batch is not None  # nothing is ever in flight
        boundaries = {0: Target(batch.state, 0)}
        for level in cut.tree.levels:
            priors: Targets = {}
            for group in cut.engine.groups(level, [boundaries[cut.tree.left(n)].value for n in level]):
                front = self.front(cut, group, boundaries, batch, step)
                priors.update(self.priors(front))
                yield front
                del front
            boundaries.update((n, self.boundary(n, prior, targets)) for n, prior in priors.items())

    def front(self, cut: Cut, group: tuple[int, ...], boundaries: Targets, batch: Batch, step: Step) -> Front:
        """Evaluates nodes of a level at once on the boundaries of their left parents."""
        above = [boundaries[cut.tree.left(n)] for n in group]
        inputs = stack([boundary.value for boundary in above])
        parents = tuple(map(cut.tree.left, group)) if self.graphs_meet else ()
        depth = max(boundary.depth for boundary in above)
        with out_of_order(cut.stages[group[0] - 1].title, inputs[0]):
            front = cut.front(group, parents, inputs, [batch] * len(group), depth, step)
        check_shape(cut.stages[group[0] - 1].title, front.outputs[0], inputs[0])
        return front

    def priors(self, front: Front) -> Targets:
        """What the nodes of a front have computed."""
        states = front.evaluation.outputs if self.graphs_meet else front.outputs
        return {n: Target(state, front.depth) for n, state in zip(front.stages, states.unbind(0), strict=True)}

    def boundary(self, node: int, prior: Target, targets: Targets) -> Target:
        """What the children of a node see."""
        if not self.posterior:
            return prior
        if not self.graphs_meet:
            return targets[node]
        # The value of the target, with the gradient of the prior.
        moved = prior.value + (targets[node].value - prior.value).detach()
        return Target(moved, targets[node].depth)


@dataclass(frozen=True)
class Errors:
    """The errors of predictions, in nats: features summed, tokens averaged.

    mean: (n,), per node, over the batch.
    samples: (n, B), each sample's own.
    factor: what turns the gradient of the mean into each sample's own gradient times the number of tokens; (n,) or one.
    """

    mean: Tensor
    samples: Tensor
    factor: Tensor | int

    def own(self, gradient: Tensor) -> Tensor:
        """Each sample's own gradient times the number of tokens, from that of the mean, (n, B, ...)."""
        if isinstance(self.factor, int):
            return self.factor * gradient
        return (self.factor.view(-1, *(1,) * (gradient.ndim - 1)) * gradient).to(gradient.dtype)


@dataclass(frozen=True)
class Arc:
    """The way from some nodes' states to an error of their own.

    nodes: n of them.
    predict: states (n, B, ...) -> what is compared, and the parameters it depends on.
    errors: what is compared -> errors.
    blocks, length: the block evaluations of ``predict`` and the longest chain of dependent ones among them.
    known: the span at which what the prediction is compared with was there.
    """

    nodes: tuple[int, ...]
    predict: Callable[[Tensor], Evaluation]
    errors: Callable[[Any], Errors]
    blocks: int = 0
    length: int = 0
    known: int = 0

    def own_gradient(self, prediction: Tensor) -> Tensor:
        """The gradient of each sample's own error in its prediction, differentiable."""
        errors = self.errors(prediction)
        return torch.autograd.grad((errors.factor * errors.mean).sum(), prediction, create_graph=True)[0]


@dataclass(frozen=True)
class Seen:
    """What an arc saw of its nodes' states."""

    arc: Arc
    prior: Tensor
    """(n, B, ...), a leaf."""
    prediction: Evaluation
    errors: Errors

    @classmethod
    def of(cls, arc: Arc, outputs: Tensor, stages: tuple[int, ...]) -> "Seen":
        """Of the outputs of some stages, (n, B, ...), those of the arc's nodes."""
        own = outputs if arc.nodes == stages else outputs[[stages.index(n) for n in arc.nodes]]
        prior = own.detach().requires_grad_()
        prediction = arc.predict(prior)
        return cls(arc, prior, prediction, arc.errors(prediction.outputs))


@dataclass(frozen=True)
class Answer:
    """What the right neighbours of some nodes make of their states, beside their targets."""

    total: Tensor
    """The sum of the errors, with its graph."""
    loss: Tensor
    """The same, with the gradients attached that train the right neighbours."""
    gradients: dict[int, Tensor]
    """Of the errors in the nodes' states, (B, ...)."""
    arrivals: dict[int, int]
    """The span at which it is known how each node is to move."""


class ArcCredit(Credit):
    """Inverted arcs: each node looks at the error of its right neighbour's prediction alone.

    The error of node n is the divergence of f_j(a_n) from the target of its right parent j, or the label's loss if j = N.
    Its gradient in a_n gives the target; its gradient in the parameters trains f_j or the head. Fronts wait for the targets
    of their right parents.

    Args: as of ``Tree``; ``length`` is its ``step``.
    """

    def __init__(
        self,
        loss: Loss,
        scope: Scope,
        inversion: Literal["none", "taylor", "exact"] = "taylor",
        length: float = 0.5,
        iterations: int = 8,
        noise: float = 0.0,
        family: str = "gaussian",
        variance: float = 1.0,
        label_variance: float = 1.0,
    ) -> None:
        super().__init__()
        self.loss = loss
        self.scope = scope
        self.inversion = inversion
        self.length = length
        self.iterations = iterations
        self.noise = noise
        self.family_name = family
        self.variance = variance
        self.label_variance = label_variance

    def losses(self, fronts: Iterator[Front], cut: Cut, targets: Targets, step: Step) -> Iterator[StageLoss]:
        waiting: list[Front] = []
        walks: list[Walk] = []
        arrivals: dict[int, int] = {}
        for front in fronts:
            waiting.append(front)
            del front
            while ready := [i for i, f in enumerate(waiting) if all(self._known(cut, targets, n) for n in f.stages)]:
                walks.append(Walk.of(waiting[ready[0]]))
                counted = counts(self.loss, waiting[ready[0]].batches[0].y)
                yield self._answer(waiting.pop(ready[0]), cut, targets, arrivals, step).times(counted)
        if waiting:
            raise ValueError(
                "arcs need states of one batch that are known node by node, as those of the tree or of the chain are"
            )
        count_walks(walks, arrivals, cut, step)

    @staticmethod
    def _known(cut: Cut, targets: Targets, node: int) -> bool:
        right = cut.tree.right(node)
        return right > cut.last or right in targets

    def _answer(self, front: Front, cut: Cut, targets: Targets, arrivals: dict[int, int], step: Step) -> StageLoss:
        """The loss that moves a front's stages to their targets, or along their gradients, and trains their right arcs."""
        answer = self.answer(front.stages, front.outputs, front.depth, cut, front.batches[0], targets, step)
        arrivals.update(answer.arrivals)
        through = (answer.total,) if step.look else ()
        return StageLoss(
            front.title, answer.loss + self.move(front, answer.gradients, cut, targets, step), through=through
        )

    def answer(
        self, nodes: tuple[int, ...], states: Tensor, depth: int, cut: Cut, batch: Batch, targets: Targets, step: Step
    ) -> Answer:
        """What the right neighbours of nodes make of their states (n, B, ...), which were there at span ``depth``; adds the
        nodes' targets to those that there are.

        One backward walk gives the gradients of all arcs, in the states and in the parameters.
        """
        family = self._family(cut, states)
        seen = [Seen.of(arc, states, nodes) for arc in self._arcs(nodes, states, cut, batch, family, targets)]
        total = torch.cat([s.errors.mean for s in seen]).sum()
        trained = [*(p for s in seen for p in s.prediction.parameters), *batch.context_leaves]
        found = torch.autograd.grad(
            total,
            [*(s.prior for s in seen), *trained],
            retain_graph=self.inversion == "exact",
            materialize_grads=True,  # a block may own parameters that it does not use
        )
        gradients: dict[int, Tensor] = {}
        arrivals: dict[int, int] = {}
        for s, gradient in zip(seen, found, strict=False):
            known = self._target(s, gradient, family, depth, targets, step)
            gradients.update(zip(s.arc.nodes, gradient.unbind(0), strict=True))
            # In block scope a node moves to its target, and else along its gradient.
            arrivals.update((n, targets[n].depth if self.scope == "block" else known) for n in s.arc.nodes)
        return Answer(total, attach_gradients(total, trained, found[len(seen) :]), gradients, arrivals)

    def move(self, front: Front, gradients: Mapping[int, Tensor], cut: Cut, targets: Targets, step: Step) -> Tensor:
        """The loss that moves a front's stages to their targets, in block scope, or along their gradients, which are needed
        in the other scopes alone."""
        evaluation = front.evaluation.outputs
        if self.scope == "block":
            target = wide(stack([targets[n].value for n in front.stages]))
            divergence = per_sample(self._family(cut, evaluation).divergence(target, wide(evaluation))).mean(1)
            step.report(front.stages, divergence=divergence)
            return divergence.sum()
        moves = stack([gradients[n] for n in front.stages])
        return attach_gradients(wide(evaluation.new_zeros(())), [evaluation], [moves])

    def _family(self, cut: Cut, states: Tensor) -> Family:
        dim = cut.network.features(states[0])
        return Gaussian(self.variance, dim) if self.family_name == "gaussian" else FAMILIES[self.family_name](dim)

    def _arcs(
        self, nodes: tuple[int, ...], states: Tensor, cut: Cut, batch: Batch, family: Family, targets: Targets
    ) -> Iterator[Arc]:
        tokens = states[0, 0].numel() // states.shape[family.dim]
        node_of = {cut.tree.right(n): n for n in nodes}
        if cut.last + 1 in node_of:
            node = node_of.pop(cut.last + 1)
            parameters = tuple(p for p in cut.network.head.parameters() if p.requires_grad)
            yield Arc(
                (node,),
                lambda states: Evaluation(self._read(cut, node, states[0], batch), parameters),
                lambda found: self._label_errors(found, batch.y, tokens),
            )
        for right in cut.engine.groups(list(node_of), [states[0]] * len(node_of)):
            yield self._right_arc(tuple(node_of[j] for j in right), right, cut, batch, family, tokens, targets)

    @staticmethod
    def _read(cut: Cut, node: int, state: Tensor, batch: Batch) -> Any:
        with still_statistics(() if node == cut.last else cut.norms), out_of_order("the head", state):
            return cut.network.read(state, batch.context)

    @staticmethod
    def _right_arc(
        nodes: tuple[int, ...],
        right: tuple[int, ...],
        cut: Cut,
        batch: Batch,
        family: Family,
        tokens: int,
        targets: Targets,
    ) -> Arc:
        held = wide(stack([targets[j].value for j in right]))

        def errors(prediction: Tensor) -> Errors:
            samples = per_sample(family.divergence(held, wide(prediction)))
            return Errors(samples.mean(1), samples, samples.shape[1] * tokens)

        def predict(states: Tensor) -> Evaluation:
            with still_statistics(cut.norms), out_of_order(cut.stages[right[0] - 1].title, states[0]):
                evaluation = cut.engine(right, states, [batch.context] * len(right))
            check_shape(cut.stages[right[0] - 1].title, evaluation.outputs[0], states[0])
            return evaluation

        known = max(targets[j].depth for j in right)
        return Arc(nodes, predict, errors, cut.size(right), cut.depth(right), known)

    def _label_errors(self, prediction: Any, y: Any, tokens: int) -> Errors:
        """The errors of what the head predicts for one node's samples.

        A loss of one value per sample counts for all of the state's tokens: the label would vanish beside the right
        neighbours' errors, of which every token has its own.
        """
        values, weights = sample_losses(self.loss, prediction, y)
        values = wide(values) / self.label_variance
        labels = values[0].numel()  # of a sample; as a rule one, or one per token
        mean = row_means(values, weights, 1)
        factor = weights.sum().clamp_min(1).reshape(1) * tokens / labels
        return Errors(mean, per_sample((values * weights).unsqueeze(0)), factor)

    def _target(self, seen: Seen, gradient: Tensor, family: Family, depth: int, targets: Targets, step: Step) -> int:
        """Finds the targets of an arc's nodes from the gradient of its errors in their states; returns the span at which the
        gradient was there."""
        arc, prior = seen.arc, seen.prior
        depth += arc.length
        step.count(arc.blocks, depth)
        depth = max(depth, arc.known) + arc.length
        step.count(arc.blocks * (2 if seen.prediction.parameters else 1), depth)
        known = depth
        own = seen.errors.own(gradient)
        if self.inversion == "none":
            target = prior.detach()
        elif self.inversion == "taylor":
            target = family.shift(prior.detach(), taylor(own, self.length))
        else:
            target = prior.detach() + gauss_newton(
                prior, seen.prediction.outputs, own, arc.own_gradient, self.variance, self.iterations
            )
            # The map u -> J^T u once; then a product with J and one with J^T an iteration, one after the other.
            step.count(arc.blocks, depth)
            depth += 2 * self.iterations * arc.length
            step.count(2 * self.iterations * arc.blocks, depth)
        if self.noise:
            target = target + self.noise * torch.randn_like(target)
        targets.update((n, Target(t, depth)) for n, t in zip(arc.nodes, target.unbind(0), strict=True))
        step.report(arc.nodes, error=seen.errors.mean)
        if arc.blocks == 0:  # the deepest node that looks at the label is the last to come
            step.label_loss = self.label_variance * seen.errors.mean[0].detach()
        if step.look:
            self._diagnose(arc, prior, target, family, step)
        return known

    def _diagnose(self, arc: Arc, prior: Tensor, target: Tensor, family: Family, step: Step) -> None:
        with torch.no_grad():
            energies = [arc.errors(arc.predict(states).outputs).samples for states in (prior, target)]
            before, after = wide(prior), wide(target)
            divergence = per_sample(family.divergence(after, before))
            change = (family.natural(after) - family.natural(before)).norm(dim=family.dim)
            step.report(
                arc.nodes,
                divergence=divergence.mean(1),
                correction=per_sample(change).mean(1),
                distance=per_sample((after - before).norm(dim=family.dim)).mean(1),
                rose=(energies[1] + divergence > energies[0]).float().mean(1),
            )


class Tree(Composed):
    """The tree with boundaries without leaks from the label: what a node hands to its children is what its block computed.

    Args:
        network: the network to train; blocks keep the shape of the state.
        boundary: what a node hands to its children: its target (``posterior``), or what its block computed (``prior``).
        scope: how far the gradient of a node's error reaches: the right neighbour (``block``: f_n then moves to its target),
            also the node's own block (``triplet``), or everything that the node's state was computed from (``tree``).
        inversion: how a target is found: not at all, by one gradient step (``taylor``), or by conjugate gradients on the
            linearised arc (``exact``; Gaussian states only).
        step: the length of the gradient step; 1/2 is exact for orthogonal linear arcs.
        iterations: conjugate-gradient iterations of the exact inversion.
        noise: standard deviation of the Gaussian noise on every target, in units of the state; Gaussian states only.
        family: the exponential family of the states, whose means the blocks exchange: embed and blocks must end in what
            yields such means, a sigmoid for bernoulli, a softmax over features for categorical.
        variance: sigma^2 of Gaussian states; a larger one weighs the states' errors less against the label's.
        label_variance: the label's error is loss / label_variance.
        stage, rim, loss, engine: as of ``Composed``.

    Raises:
        ValueError: an option has no such value, or two of them exclude each other.
    """

    def __init__(
        self,
        network: Chain,
        *,
        stage: int | Sequence[int] = 1,
        boundary: Literal["posterior", "prior"] = "prior",
        scope: Scope = "triplet",
        inversion: Literal["none", "taylor", "exact"] = "taylor",
        step: float = 0.5,
        iterations: int = 8,
        noise: float = 0.0,
        family: Literal["gaussian", "bernoulli", "categorical"] = "gaussian",
        variance: float = 1.0,
        label_variance: float = 1.0,
        rim: float = 0.0,
        loss: Loss = cross_entropy,
        engine: EngineChoice = "auto",
    ) -> None:
        check_choice("boundary", boundary, ("posterior", "prior"))
        check_choice("scope", scope, ("block", "triplet", "tree"))
        check_choice("inversion", inversion, ("none", "taylor", "exact"))
        check_choice("family", family, FAMILIES)
        for name, value in (("step", step), ("variance", variance), ("label_variance", label_variance)):
            check_number(name, value, above=0)
        check_number("iterations", iterations, least=1)
        for name, value in (("noise", noise), ("rim", rim)):
            check_number(name, value, least=0.0)
        if noise and family != "gaussian":
            raise ValueError("noise is for Gaussian states: it would take other families' means out of their range")
        if inversion == "exact" and family != "gaussian":
            raise ValueError("the exact inversion is for Gaussian states; take inversion='taylor' for other families")
        super().__init__(
            network,
            TreeStates(boundary, carry_gradient=scope == "tree"),
            ArcCredit(loss, scope, inversion, step, iterations, noise, family, variance, label_variance),
            stage=stage,
            rim=rim / label_variance,  # its share of the label's error
            loss=loss,
            engine=engine,
        )


class Paper(Tree):
    """HBLL as published: children see targets, which contain the label, and every loss is local to a block.

    Args:
        network: the network to train; blocks keep the shape of the state.
        boundary, scope, options: as of ``Tree``.
    """

    def __init__(
        self,
        network: Chain,
        *,
        boundary: Literal["posterior", "prior"] = "posterior",
        scope: Scope = "block",
        **options: Any,
    ) -> None:
        super().__init__(network, boundary=boundary, scope=scope, **options)
