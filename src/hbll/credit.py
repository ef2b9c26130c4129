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
from hbll.kept import concatenate, map_tensors
from hbll.network import TreeNetwork
from hbll.rule import Rule
from hbll.scan import Coarse, correct_transposed, defect
from hbll.stages import Stages, fresh_copy
from hbll.trace import Correction, Trace, attach_gradients, per_sample, wide
from hbll.tree import Tree

__all__ = ["Arc", "ArcCredit", "Credit", "Errors", "ExactCredit", "ScanCredit", "SpineCredit", "spine"]


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


class Credit(nn.Module):
    """What every credit module offers."""

    pulls_back = False
    """Whether gradients are pulled back through the states' own evaluations."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule

    def prepare(self, network: TreeNetwork, stages: Stages) -> None:
        """Makes the parameters that the credit needs for a network."""

    def correct(self, trace: Trace, nodes: Sequence[int]) -> None:
        """Adds the corrections of these nodes to the trace."""
        raise NotImplementedError

    def finish(self, trace: Trace) -> None:
        """Adds the corrections that the states module did not ask for, once all states are known."""
        raise NotImplementedError


@dataclass(frozen=True)
class Arc:
    """The way from some nodes' states to an error of their own.

    The functions do not hold the trace, which holds them in its corrections: in a cycle a step's tensors would stay until
    the garbage collector comes.

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

    def invert(self, trace: Trace, rule: Rule, weight: float = 1.0) -> None:
        """Adds the nodes' corrections to the trace, and the loss that trains what the arc leads through.

        One backward walk gives the gradient in the states and in the parameters; both are multiplied by ``weight``.
        """
        prior = trace.outputs(self.nodes).requires_grad_()
        prediction = self.predict(prior)
        errors = self.errors(prediction.outputs)
        total = errors.mean.sum() if weight == 1.0 else weight * errors.mean.sum()
        if trace.observer:
            trace.observer(self.nodes, total)
        gradient, *for_parameters = torch.autograd.grad(
            total,
            [prior, *prediction.parameters],
            retain_graph=rule.inversion == "exact",
            materialize_grads=True,  # a block may own parameters that it does not use
        )
        depth = trace.depth("output", self.nodes) + self.length
        trace.count(self.blocks, depth)
        depth = max(depth, self.known) + self.length
        trace.count(self.blocks * (2 if prediction.parameters else 1), depth)
        own = errors.own(gradient)
        if rule.inversion == "none":
            target = prior.detach()
        elif rule.inversion == "taylor":
            target = trace.family.shift(prior.detach(), taylor(own, rule.step))
        else:
            target = prior.detach() + gauss_newton(
                prior, prediction.outputs, own, self._own_gradient, rule.variance, rule.iterations
            )
            # The map u -> J^T u once; then a product with J and one with J^T an iteration, one after the other.
            trace.count(self.blocks, depth)
            depth += 2 * rule.iterations * self.length
            trace.count(2 * rule.iterations * self.blocks, depth)
        if rule.noise:
            target = target + rule.noise * torch.randn_like(target)
        trace.add_correction(
            Correction(self.nodes, prior.detach(), gradient, target, depth, errors.mean.detach(), self._energy)
        )
        trace.terms.append((self.nodes, attach_gradients(total, prediction.parameters, for_parameters)))

    def _own_gradient(self, prediction: Tensor) -> Tensor:
        errors = self.errors(prediction)
        weights = errors.factor * errors.mean
        return torch.autograd.grad(weights.sum(), prediction, create_graph=True)[0]

    def _energy(self, states: Tensor) -> Tensor:
        return self.errors(self.predict(states).outputs).samples


class ArcCredit(Credit):
    """Inverted arcs: each node looks at the error of its right neighbour's prediction alone (arXiv 2606.21497, section 3).

    The error of node n is the divergence of f_j(a_n) from the target of its right parent j, or the label's loss if j = N.
    Its gradient in a_n gives the target; its gradient in the parameters trains f_j or the head.
    """

    def correct(self, trace: Trace, nodes: Sequence[int]) -> None:
        node_of = {trace.tree.right(n): n for n in nodes}
        if trace.tree.nodes in node_of:
            node = node_of.pop(trace.tree.nodes)
            head, y, rule, tokens = trace.network.head, trace.y, trace.rule, trace.tokens
            Arc(
                (node,), lambda states: on_head(head, states), lambda found: label_errors(rule, tokens, found, y, 1)
            ).invert(trace, self.rule)
        for right in trace.engine.groups(list(node_of)):
            self._right_arc(trace, tuple(node_of[j] for j in right), right).invert(trace, self.rule)

    def finish(self, trace: Trace) -> None:
        for level in trace.tree.levels:
            if level[0] not in trace.target:
                self.correct(trace, level)

    @staticmethod
    def _right_arc(trace: Trace, nodes: tuple[int, ...], right: tuple[int, ...]) -> Arc:
        targets = wide(stack([trace.target[j] for j in right]))
        engine, family, tokens = trace.engine, trace.family, trace.tokens

        def errors(prediction: Tensor) -> Errors:
            samples = per_sample(family.divergence(targets, wide(prediction)))
            return Errors(samples.mean(1), samples, samples.shape[1] * tokens)

        return Arc(
            nodes,
            lambda states: engine(right, states),
            errors,
            trace.stages.size(right),
            trace.stages.depth(right),
            trace.depth("target", right),
        )


class ExactCredit(Credit):
    """The gradient of the label's loss through the graph that the states carry: with chain states, backpropagation."""

    def finish(self, trace: Trace) -> None:
        assert trace.last is not None  # the rule pairs exact credit with chain states
        block, state = trace.last
        node = trace.stages.of(block)
        loss = label_errors(trace.rule, trace.tokens, trace.network.head(state), trace.y, 1).mean.sum()
        if trace.observer:
            trace.observer((node,), loss)
        trace.terms.append(((node,), loss))


class ScanCredit(Credit):
    """Gradients at all stages' outputs at once, by sweeps of vector-Jacobian products.

    Every stage starts from the gradient at the head. A sweep pulls all of them back through their stages and carries the
    disagreement on to all earlier stages, along the skip connections, by a suffix sum. After as many sweeps as there are
    stages the gradients are exact for the states at hand.
    """

    pulls_back = True

    def __init__(self, rule: Rule) -> None:
        super().__init__(rule)
        self.coarse: Coarse = "identity" if rule.coarse == "skip" else None

    def finish(self, trace: Trace) -> None:
        nodes = trace.stages.nodes
        outputs = trace.outputs(nodes)
        state = outputs[-1] if trace.head_state is None else trace.head_state
        errors, at_head = train_head(trace, nodes[-1], state, trace.y)
        total = errors.mean.sum()
        credit = at_head.expand(len(nodes) + 1, *at_head.shape)  # b_0 .. b_S
        depth = trace.depth("output", nodes)
        if trace.observer:
            for n in nodes:
                trace.observer((n,), total)
                for wave in trace.waves:
                    if self.rule.credit_sweeps and wave.nodes[0] > n:
                        trace.observer((n,), wave.evaluation.outputs)
        for _ in range(self.rule.credit_sweeps):
            pulled, depth = trace.pull_back(credit[1:], depth)
            last = credit
            credit = torch.cat([correct_transposed(last[1:], pulled, self.coarse), at_head.unsqueeze(0)])
            if self.rule.tolerance is not None and defect(credit, last) <= self.rule.tolerance:
                break
        at_input, credit = credit[0], credit[1:]
        embedded = trace.boundary[0]
        if embedded.requires_grad:
            trace.terms.append(("embed", attach_gradients(total.new_zeros(()), [embedded], [at_input])))
        target = trace.family.shift(outputs, taylor(errors.own(credit), self.rule.step))
        error = total.new_full((len(nodes),), torch.nan)
        error[-1] = total.detach()
        trace.add_correction(Correction(nodes, outputs, credit, target, depth, error))


class SpineCredit(Credit):
    """The gradient of the label's loss through a few jumps: each stage's output goes on to the head through the last
    blocks of at most log2 S + 1 later stages, which learn to be called from afar.

    Without jumps and with heads of their own the stages learn greedily (Belilovsky et al., arXiv 1901.08164).
    """

    def __init__(self, rule: Rule) -> None:
        super().__init__(rule)
        self.heads = nn.ModuleList()

    def prepare(self, network: TreeNetwork, stages: Stages) -> None:
        if self.rule.heads == "own" and not self.heads:
            self.heads.extend(fresh_copy(network.head) for _ in stages.nodes[:-1])

    def finish(self, trace: Trace) -> None:
        nodes = tuple(sorted(n for wave in trace.waves for n in wave.nodes))
        chosen = nodes
        if self.training and self.rule.spine_share < 1:
            count = max(1, round(self.rule.spine_share * len(nodes)))
            chosen = tuple(nodes[i] for i in sorted(torch.randperm(len(nodes))[:count].tolist()))
        weight = len(nodes) / len(chosen)
        # Shorter stages need not wait for longer ones, and an audit is to tell the nodes' losses apart.
        apart: dict[int, list[int]] = {}
        for n in chosen:
            apart.setdefault(n if trace.observer else trace.depth("output", [n]), []).append(n)
        for together in apart.values():
            self._arc(trace, tuple(together)).invert(trace, self.rule, weight)

    def _head(self, trace: Trace, node: int) -> nn.Module:
        if self.rule.heads == "shared" or node == trace.stages.nodes[-1]:
            return trace.network.head
        if len(self.heads) != len(trace.stages.nodes) - 1:
            raise ValueError(
                f"{len(self.heads)} heads for {len(trace.stages.nodes) - 1} stages before the last: call "
                "objective.prepare(network) before the optimizer is made, and take an objective for each network"
            )
        return self.heads[node - 1]

    def _arc(self, trace: Trace, nodes: tuple[int, ...]) -> Arc:
        spines = [spine(n, trace.tree, self.rule.spine) for n in nodes]
        if trace.labels is None:
            labels = concatenate([trace.y] * len(nodes))
        else:
            labels = map_tensors(lambda label: label[[n - 1 for n in nodes]].flatten(0, 1), trace.labels)
        engine, rule, tokens, shared = trace.stages.last_blocks, trace.rule, trace.tokens, trace.network.head
        heads = {n: self._head(trace, n) for n in nodes}

        def predict(states: Tensor) -> Evaluation:
            current = list(states.unbind(0))
            for step in range(max(map(len, spines))):
                moving = [i for i, jumps in enumerate(spines) if step < len(jumps)]
                through = [spines[i][step] for i in moving]
                for positions in engine.partition(through):
                    group = tuple(through[p] for p in positions)
                    evaluation = engine(group, stack([current[moving[p]] for p in positions]))
                    for p, state in zip(positions, evaluation.outputs.unbind(0), strict=True):
                        current[moving[p]] = state
            if rule.heads == "own":
                found = torch.cat([head(state) for head, state in zip(heads.values(), current, strict=True)])
            else:
                found = shared(torch.cat(current))
            # The modules' own parameters, each once: several spines pass the same block, alone or stacked with others, and
            # autograd would add up all of these ways in every one of them.
            passed = [*(engine.blocks[n - 1] for jumps in spines for n in jumps), *heads.values()]
            parameters = dict.fromkeys(p for m in dict.fromkeys(passed) for p in m.parameters() if p.requires_grad)
            return Evaluation(found, tuple(parameters))

        return Arc(
            nodes,
            predict,
            lambda found: label_errors(rule, tokens, found, labels, len(nodes)),
            blocks=sum(map(len, spines)),
            length=max(map(len, spines)),
        )


def spine(node: int, tree: Tree, kind: str) -> tuple[int, ...]:
    """The stages whose last blocks a stage's output passes on its way to the head.

    Args:
        node: the stage.
        tree: the tree over stages 1..S.
        kind: ``doubling``: node + 1, + 3, + 7, .., S; ``right``: the right parents up to the label; ``last``: S; ``none``.
    """
    last = tree.nodes - 1
    if kind == "none" or node == last:
        return ()
    if kind == "last":
        return (last,)
    if kind == "right":
        after = tree.right(node)
        return () if after > last else (after, *spine(after, tree, kind))
    ahead = [node + 2**k - 1 for k in range(1, (last - node).bit_length() + 1)]
    return (*(n for n in ahead if n < last), last)


def train_head(trace: Trace, node: int, state: Tensor, y: Any) -> tuple[Errors, Tensor]:
    """Adds the head's loss on the state (B, ...) of a node; returns its errors and their gradient in the state."""
    state = state.detach().requires_grad_()
    prediction = on_head(trace.network.head, state.unsqueeze(0))
    errors = label_errors(trace.rule, trace.tokens, prediction.outputs, y, 1)
    total = errors.mean.sum()
    gradient, *for_head = torch.autograd.grad(total, [state, *prediction.parameters], materialize_grads=True)
    trace.terms.append(((node,), attach_gradients(total, prediction.parameters, for_head)))
    return errors, gradient


def on_head(head: nn.Module, states: Tensor) -> Evaluation:
    """The head on one node's state, (1, B, ...)."""
    return Evaluation(head(states[0]), tuple(p for p in head.parameters() if p.requires_grad))


def label_errors(rule: Rule, tokens: int, prediction: Any, y: Any, nodes: int) -> Errors:
    """The errors of what the head predicts for the samples of some nodes, one node's after the other's.

    A loss of one value per sample counts for all of the state's tokens: the label would vanish beside the right
    neighbours' errors, of which every token has its own.

    Raises:
        ValueError: the loss is one number for the whole batch.
    """
    returned = rule.loss(prediction, y)
    values, weights = returned if isinstance(returned, tuple) else (returned, None)
    if values.ndim == 0:
        raise ValueError(
            "the loss must return one value per sample, not their mean: torch's losses take reduction='none'"
        )
    values = (wide(values) / rule.label_variance).unflatten(0, (nodes, -1))
    labels = values[0, 0].numel()  # of a sample; as a rule one, or one per token
    if weights is None:
        count: Tensor | int = values[0].numel()
        factor: Tensor | int = values.shape[1] * tokens
    else:
        weights = weights.unflatten(0, (nodes, -1))
        values, count = values * weights, weights.flatten(1).sum(1)
        factor = count * tokens / labels
    return Errors(values.flatten(1).sum(1) / count, per_sample(values), factor)
