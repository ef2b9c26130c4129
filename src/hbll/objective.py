"""A training rule at work: states, credit and local update give one loss, and a report per node.

objective = Objective("paper")            # or "tree", "bp", or options by name
step = objective(network, x, y)
step.loss.backward()                      # any torch optimizer then moves network.parameters()
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hbll.blocks import stack
from hbll.credit import ArcCredit, Credit, ExactCredit, ScanCredit, SpineCredit, label_errors
from hbll.kept import Kept
from hbll.layout import Layout, Readout
from hbll.network import TreeNetwork, evaluating
from hbll.pipeline import LateCredit
from hbll.rule import make_rule
from hbll.stages import Stages
from hbll.states import STATES, ScanStates
from hbll.trace import Trace, attach_gradients, per_sample, wide

__all__ = ["NodeReport", "Objective", "Step", "gradient_cosines"]


@dataclass(frozen=True)
class NodeReport:
    """What one node did in one step; means over the batch and over tokens, in nats where it is an error.

    Fields are None where the rule has no such thing, and ``rose`` and ``cosine`` unless ``Objective.diagnose`` was asked.
    """

    error: float | None
    """Of the node's arc: the divergence of its prediction from its target, or the label's loss / label_variance."""
    divergence: float | None = None
    """KL(target || prior); the node's own loss in block scope."""
    correction: float | None = None
    """Norm of the change of the natural parameters from prior to target."""
    distance: float | None = None
    """Norm of the change of the means from prior to target."""
    rose: float | None = None
    """Share of samples for which divergence + error is larger at the target than at the prior: the step was too long."""
    cosine: float | None = None
    """Cosine between the gradient of the node's block and backpropagation's on the chain."""


class Step:
    """What a call of an objective returns.

    Attributes:
        loss: a scalar with graph: the sum of all nodes' losses. Its gradients are the rule's updates.
        work, span: block evaluations of this step, all of them and the longest chain of dependent ones, in the units of
            ``hbll.trace``; the backward pass through ``loss`` is counted in, made or not.
        engine: how the blocks were evaluated, ``loop`` or ``batched``.
        defect: of scan states, how far the last sweep still moved them, ||new - old|| / ||new||; a scalar without graph.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.loss = torch.stack([term for _, term in trace.terms]).sum()
        self.work = trace.work
        self.span = trace.span
        self.engine = trace.engine.name
        self.defect = trace.defect

    def __repr__(self) -> str:
        return f"Step(loss={self.loss.item():.4g}, work={self.work}, span={self.span}, engine={self.engine})"

    @cached_property
    def nodes(self) -> dict[int, NodeReport]:
        """A report per corrected node, computed when first asked for (which waits for the device)."""
        return self.report({}, {})

    def report(self, rose: dict[int, float], cosine: dict[int, float]) -> dict[int, NodeReport]:
        """The reports, with what a diagnosis adds."""
        reports = {}
        family, trace = self.trace.family, self.trace
        for c in trace.corrections:
            prior, target = wide(c.prior), wide(c.target)
            change = (family.natural(target) - family.natural(prior)).norm(dim=family.dim)
            fields = [
                c.error,
                per_sample(family.divergence(target, prior)).mean(1),
                per_sample(change).mean(1),
                per_sample((target - prior).norm(dim=family.dim)).mean(1),
            ]
            for n, (error, *changes) in zip(c.nodes, torch.stack(fields, 1).tolist(), strict=True):
                own = None if math.isnan(error) else error
                reports[n] = NodeReport(own, *changes, rose=rose.get(n), cosine=cosine.get(n))
        if not reports:  # exact credit corrects no node
            (nodes, term), *_ = trace.terms
            if not isinstance(nodes, str):  # while a pipeline fills, no node learns
                reports = {nodes[0]: NodeReport(term.item(), cosine=cosine.get(nodes[0]))}
        return dict(sorted(reports.items()))


CREDITS: dict[str, type[Credit]] = {
    "arcs": ArcCredit,
    "exact": ExactCredit,
    "scan": ScanCredit,
    "spine": SpineCredit,
    "late": LateCredit,
}


class Objective(nn.Module):
    """A training rule: a preset, or any combination of options.

    Args:
        rule: a name in ``PRESETS``: ``paper`` (HBLL as published), ``tree`` (its leak-free variant), ``scan`` and ``stream``
            (whose chain is accurate at full depth) or ``bp`` (backpropagation).
        options: fields of ``hbll.rule.Rule`` that replace the preset's.

    Raises:
        ValueError: an unknown rule, option or value, or a combination that cannot be.
    """

    def __init__(self, rule: str = "paper", **options: Any) -> None:
        super().__init__()
        self.rule = make_rule(rule, options)
        self.states = STATES[self.rule.states](self.rule)
        self.credit: Credit = CREDITS[self.rule.credit](self.rule)
        self._stages: WeakKeyDictionary[TreeNetwork, Stages] = WeakKeyDictionary()

    def stages(self, network: TreeNetwork) -> Stages:
        """The network's stages and the engine that evaluates them, made when the objective first sees these blocks.

        Raises:
            ValueError: it is no network of blocks, or cannot be cut as the rule has it.
        """
        if not hasattr(network, "blocks"):  # a compiled TreeNetwork has them
            raise ValueError(
                f"an objective trains a TreeNetwork, not a {type(network).__name__}; of a wrapper such as "
                "DistributedDataParallel hand over its .module"
            )
        stages = self._stages.get(network)
        if stages is None or stages.blocks != list(network.blocks):
            stages = self._stages[network] = Stages(network.blocks, self.rule.stage, self.rule.engine)
        return stages

    def prepare(self, network: TreeNetwork, x: Any = None) -> "Objective":
        """Makes the parameters that a rule has beside the network's (a predictor tree has, most rules have none).

        An input batch, by which other rules see the shapes of states, is not needed: here all have one shape.

        To be called before the optimizer is made, which then takes ``[*network.parameters(), *objective.parameters()]``.
        """
        self.states.prepare(network, self.stages(network))
        self.credit.prepare(network, self.stages(network))
        return self

    def reset(self) -> None:
        """Forgets what the rule keeps from step to step, such as mini-batches on their way: it is ready for another network,
        or for batches of another size."""
        for module in self.modules():
            if isinstance(module, Kept):
                module.reset()

    def readouts(self, network: TreeNetwork) -> list[Readout]:
        """The chain and the paths that the tree trains, which are measured of every rule alike."""
        return network.readouts

    def layout(self, network: TreeNetwork) -> Layout:
        """The stages by their numbers, in the order in which the tree is walked."""
        stages = self.stages(network)
        named = {
            f"node {s}": nn.Sequential(*(network.blocks[n - 1] for n in numbers))
            for s, numbers in enumerate(stages.numbers, 1)
        }
        parts = {"the embed": network.embed, **named, "the head": network.head}
        walk = [node for level in stages.tree.levels for node in level]
        return Layout(stages.engine.name, parts, walk if self.rule.states == "tree" else None)

    def predict(self, network: TreeNetwork, x: Any, sweeps: int) -> Tensor:
        """The head's output of scan states after so many sweeps: an anytime readout of the chain, which it becomes after as
        many sweeps as there are stages. Sweeps start from the rule's guess; from the embedded input if that is computed
        ahead.

        Raises:
            ValueError: the rule has other states, or the number is negative.
        """
        if not isinstance(self.states, ScanStates):
            raise ValueError("the anytime readout is of scan states: take states='scan'")
        if sweeps < 0:
            raise ValueError(f"sweeps must not be negative; got {sweeps}")
        # Running statistics, and what the guess keeps from step to step, stay as they are.
        with torch.no_grad(), evaluating(network), evaluating(self):
            trace = Trace(network, self.stages(network), self.rule, x, None)
            states = self.states.sweep(trace, self.states.guess.cold(trace), sweeps, None)
            return network.head(states[-1])

    def forward(self, network: TreeNetwork, x: Any, y: Any) -> Step:
        """One training step up to the loss.

        Args:
            network: the network to train.
            x: a batch of what its embed takes.
            y: its labels, as the rule's loss takes them; classes (B,) or (B, T) by default.

        Raises:
            ValueError: a block changes the state's shape, or a label is outside the classes.
        """
        return self.follow(Trace(network, self.stages(network), self.rule, x, y))

    def follow(self, trace: Trace) -> Step:
        """Carries the rule out on a new trace.

        Raises:
            ValueError: gradients are switched off.
        """
        if not torch.is_grad_enabled() and self.rule.credit != "exact":
            raise ValueError(
                "a step finds its gradients as it goes: call the objective outside of torch.no_grad(); a validation loss is "
                "that of network(x)"
            )
        trace.pulls_back = self.credit.pulls_back
        self.states(trace, self.credit)
        self.credit.finish(trace)
        self._update(trace)
        trace.count_backward()
        if self.rule.rim:
            self._train_rim(trace)
        step = Step(trace)
        for write in trace.at_end:
            write()
        return step

    def _update(self, trace: Trace) -> None:
        """Every block moves its output to the node's target, or along the node's gradient."""
        for wave in trace.waves:
            outputs, parameters = wave.evaluation.outputs, wave.evaluation.parameters
            moving = [i for i, n in enumerate(wave.nodes) if n in trace.target]
            if not moving or (trace.pulls_back and not parameters):
                continue
            nodes = tuple(wave.nodes[i] for i in moving)
            if len(moving) < len(wave.nodes):
                outputs = outputs[moving]
            if self.rule.scope == "block":
                target = stack([trace.target[n] for n in nodes])
                moved = per_sample(trace.family.divergence(wide(target), wide(outputs))).mean(1).sum()
                value, weight = moved, None
            else:
                moved, weight = outputs, stack([trace.gradient[n] for n in nodes])
                value = torch.zeros((), dtype=wide(weight).dtype, device=weight.device)
            if trace.pulls_back:  # the inputs are leaves, into which loss.backward() would put gradients
                gradients = torch.autograd.grad(moved, parameters, weight, materialize_grads=True)
                term = attach_gradients(value, parameters, gradients)
            else:
                term = value if weight is None else attach_gradients(value, [moved], [weight])
            trace.terms.append((nodes, term))

    @staticmethod
    def _train_rim(trace: Trace) -> None:
        """Backpropagation along the rim with an exit to the head after every block of it."""
        state, errors = trace.boundary[0], []
        rim = trace.network.tree.rim
        for n in rim:
            state = trace.network.blocks[n - 1](state)
            errors.append(label_errors(trace.rule, trace.tokens, trace.network.head(state), trace.y, 1).mean)
        trace.terms.append(("rim", trace.rule.rim * torch.cat(errors).mean()))
        trace.count(3 * len(rim), 2 * len(rim))

    def diagnose(self, network: TreeNetwork, x: Any, y: Any) -> dict[int, NodeReport]:
        """The reports of one batch with ``rose`` and ``cosine``; costs about two steps and leaves no gradient behind.

        Of ``scan`` from states computed ahead it is the batch that is due, with the states that a training step would have;
        the batch at hand, whose states are then exact, as long as none is due. States of ``stream`` are computed anew, in
        order: the cosine is that of the credit.

        Empty for the asynchronous pipeline, which has no gradients of the batch at hand.
        """
        if self.rule.credit == "late":
            return {}  # its gradients are of other batches
        with evaluating(self), evaluating(network):  # what both keep from step to step stays as it is
            return self._diagnosis(network, x, y)

    def _diagnosis(self, network: TreeNetwork, x: Any, y: Any) -> dict[int, NodeReport]:
        trace = Trace(network, self.stages(network), self.rule, x, y)
        trace.diagnosis = True
        step = self.follow(trace)
        family = trace.family
        rose = {}
        with torch.no_grad():
            for c in trace.corrections:
                if c.energy is None:
                    continue
                prior, target = wide(c.prior), wide(c.target)
                after = c.energy(c.target) + per_sample(family.divergence(target, prior))
                share = (after > c.energy(c.prior)).float().mean(1)
                rose.update(zip(c.nodes, share.tolist(), strict=True))
        return step.report(rose, self.cosines(network, step))

    def extra_repr(self) -> str:
        return f"{self.rule}"

    def __getstate__(self) -> dict[str, Any]:
        # Stages are found again from the network; a copy of the objective must not copy the network's blocks with them.
        return {name: value for name, value in self.__dict__.items() if name != "_stages"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._stages = WeakKeyDictionary()

    def cosines(self, network: TreeNetwork, step: Step) -> dict[int, float]:
        """Between every node's gradient in a step and backpropagation's on the batch that the step learned from.

        The step's graph is gone afterwards.
        """
        exact = Objective("bp", loss=self.rule.loss, engine="loop")(network, step.trace.x, step.trace.y)
        stages = enumerate(step.trace.stages.numbers, 1)
        owned = {n: [p for b in numbers for p in network.blocks[b - 1].parameters()] for n, numbers in stages}
        return gradient_cosines(step.loss, exact.loss, owned)


def gradient_cosines(ours: Tensor, exact: Tensor, owned: Mapping[int, Sequence[nn.Parameter]]) -> dict[int, float]:
    """The cosine between the gradients of two losses, for every node with trainable parameters.

    Args:
        ours, exact: scalars with graph.
        owned: the parameters of every node.
    """
    trained = {n: [p for p in parameters if p.requires_grad] for n, parameters in owned.items()}
    flat = [p for parameters in trained.values() for p in parameters]
    if not flat:
        return {}
    mine, others = (
        dict(zip(flat, torch.autograd.grad(loss, flat, materialize_grads=True), strict=True)) for loss in (ours, exact)
    )

    def joined(gradients: dict[nn.Parameter, Tensor], n: int) -> Tensor:
        return torch.cat([gradients[p].flatten() for p in trained[n]])

    return {
        n: torch.cosine_similarity(joined(mine, n), joined(others, n), dim=0).item()
        for n, parameters in trained.items()
        if parameters
    }
