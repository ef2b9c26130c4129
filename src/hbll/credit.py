"""Estimates of the credit: how each state ought to move to lower the loss.

A credit module corrects nodes whose states are known: for each it finds the gradient of an error in the node's state and
a target to move to. ``correct`` is called by the states module where it needs targets, ``finish`` for all that remain.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hbll.blocks import Evaluation, stack
from hbll.inversion import gauss_newton, taylor
from hbll.rule import Rule
from hbll.trace import Correction, Trace, attach_gradients, wide

__all__ = ["CREDIT", "ArcCredit", "Credit", "Errors", "ExactCredit"]


@dataclass(frozen=True)
class Errors:
    """The errors of predictions, in nats: features summed, tokens averaged.

    mean: (n,), per node, over the batch.
    samples: (n, B), each sample's own.
    factor: what turns the gradient of the mean into each sample's own gradient times the number of tokens.
    """

    mean: Tensor
    samples: Tensor
    factor: Tensor | int


class Credit(nn.Module):
    """What every credit module offers."""

    def correct(self, trace: Trace, nodes: Sequence[int]) -> None:
        """Adds the corrections of these nodes to the trace."""
        raise NotImplementedError

    def finish(self, trace: Trace) -> None:
        """Adds the corrections that the states module did not ask for, once all states are known."""
        raise NotImplementedError


class ArcCredit(Credit):
    """Inverted arcs: each node looks at the error of its right neighbour's prediction alone (arXiv 2606.21497, section 3).

    The error of node n is the divergence of f_j(a_n) from the target of its right parent j, or the label's loss if j = N.
    Its gradient in a_n gives the target; its gradient in the parameters trains f_j or the head. Both come from one walk.
    """

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule

    def correct(self, trace: Trace, nodes: Sequence[int]) -> None:
        node_of = {trace.tree.right(n): n for n in nodes}
        if trace.tree.nodes in node_of:
            node = node_of.pop(trace.tree.nodes)
            self._invert(
                trace, (node,), lambda state: on_head(trace, state), lambda logits: label_errors(trace, logits)
            )
        for right in trace.engine.groups(list(node_of)):
            self._invert_arcs(trace, tuple(node_of[j] for j in right), right)

    def finish(self, trace: Trace) -> None:
        for level in trace.tree.levels:
            if level[0] not in trace.target:
                self.correct(trace, level)

    def _invert_arcs(self, trace: Trace, nodes: tuple[int, ...], right: tuple[int, ...]) -> None:
        targets = wide(stack([trace.target[j] for j in right]))

        def errors(prediction: Tensor) -> Errors:
            samples = trace.per_sample(trace.family.divergence(targets, wide(prediction)))
            return Errors(samples.mean(1), samples, samples.shape[1] * trace.tokens)

        self._invert(trace, nodes, lambda state: trace.engine(right, state), errors, right)

    def _invert(
        self,
        trace: Trace,
        nodes: tuple[int, ...],
        predict: Callable[[Tensor], Evaluation],
        errors: Callable[[Any], Errors],
        right: tuple[int, ...] = (),
    ) -> None:
        rule = self.rule
        prior = trace.outputs(nodes).requires_grad_()
        arc = predict(prior)
        found = errors(arc.outputs)
        total = found.mean.sum()
        if trace.observer:
            trace.observer(nodes, total)
        gradient, *for_parameters = torch.autograd.grad(
            total,
            [prior, *arc.parameters],
            retain_graph=rule.inversion == "exact",
            materialize_grads=True,  # a block may own parameters that it does not use
        )
        depth = trace.depth("output", nodes)
        if right:
            blocks, length = trace.stages.size(right), trace.stages.depth(right)
            depth += length
            trace.count(blocks, depth)
            depth = max(depth, trace.depth("target", right)) + length
            trace.count(blocks * (2 if arc.parameters else 1), depth)
        if rule.inversion == "none":
            target = prior.detach()
        elif rule.inversion == "taylor":
            target = trace.family.shift(prior.detach(), taylor(found.factor * gradient, rule.step))
        else:

            def own_gradient(prediction: Tensor) -> Tensor:
                again = errors(prediction)
                return torch.autograd.grad(again.mean.sum() * again.factor, prediction, create_graph=True)[0]

            delta = gauss_newton(
                prior, arc.outputs, found.factor * gradient, own_gradient, rule.variance, rule.iterations
            )
            target = prior.detach() + delta
            if right:
                # The map u -> J^T u once; then a product with J and one with J^T an iteration, one after the other.
                trace.count(blocks, depth)
                depth += 2 * rule.iterations * length
                trace.count(2 * rule.iterations * blocks, depth)
        if rule.noise:
            target = target + rule.noise * torch.randn_like(target)
        trace.add_correction(
            Correction(
                nodes,
                prior.detach(),
                gradient,
                target,
                found.mean.detach(),
                lambda state: errors(predict(state).outputs).samples,
                depth,
            )
        )
        trace.terms.append((nodes, attach_gradients(total, arc.parameters, for_parameters)))


class ExactCredit(Credit):
    """The gradient of the label's loss through the graph that the states carry: with chain states, backpropagation."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()

    def finish(self, trace: Trace) -> None:
        assert trace.last is not None  # the rule pairs exact credit with chain states
        node, state = trace.last
        loss = label_errors(trace, trace.network.head(state)).mean.sum()
        if trace.observer:
            trace.observer((node,), loss)
        trace.terms.append(((node,), loss))


def on_head(trace: Trace, state: Tensor) -> Evaluation:
    """The head on one node's state, (1, B, ...)."""
    head = trace.network.head
    return Evaluation(head(state[0]), tuple(p for p in head.parameters() if p.requires_grad))


def label_errors(trace: Trace, prediction: Any) -> Errors:
    """The errors of what the head predicts, as of one node.

    A loss of one value per sample counts for all of the state's tokens: the label would vanish beside the right
    neighbours' errors, of which every token has its own.
    """
    returned = trace.rule.loss(prediction, trace.y)
    values, weights = returned if isinstance(returned, tuple) else (returned, None)
    values = wide(values) / trace.rule.label_variance
    if weights is None:
        total, count = values.sum(), values.numel()
    else:
        values = values * weights
        total, count = values.sum(), weights.sum()
    samples = values.unsqueeze(0)
    factor = count if values.ndim > 1 else count * trace.tokens
    return Errors((total / count).view(1), trace.per_sample(samples), factor)


CREDIT: dict[str, type[Credit]] = {"arcs": ArcCredit, "exact": ExactCredit}
