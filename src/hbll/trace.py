"""What one training step has computed so far: the states with their graphs, the credit, the losses, and their cost.

States and credit (``hbll.states``, ``hbll.credit``) write into a Trace, the objective reads the losses from it. Every
block evaluation is counted as it happens: *work* is their number and *span* the longest chain of them in which each needs
the one before. One forward evaluation, one vector-Jacobian product for a block's input and one for its parameters cost a
unit each; embed and head cost nothing. Parameter products hang off the chain: nothing waits for them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hbll.blocks import Evaluation, check_shape, check_tensor, stack
from hbll.families import FAMILIES, Family, Gaussian
from hbll.network import TreeNetwork
from hbll.rule import Rule
from hbll.stages import Stages
from hbll.tree import Path

__all__ = ["Correction", "Trace", "Wave", "assemble", "attach_gradients", "check_batch", "per_sample", "wide"]


@dataclass(frozen=True)
class Wave:
    """Blocks that were evaluated together as part of the states.

    nodes: n of them; parents: the node whose boundary each one read.
    inputs, evaluation.outputs: (n, B, ...), with graph.
    depth: the span at which the outputs were there.
    """

    nodes: tuple[int, ...]
    parents: tuple[int, ...]
    inputs: Tensor
    evaluation: Evaluation
    depth: int


@dataclass(frozen=True)
class Correction:
    """The credit of nodes that were corrected together; all tensors detached.

    prior: (n, B, ...), the states a_n that their blocks computed.
    gradient: (n, B, ...), of the mean error in them.
    target: (n, B, ...), the posterior states.
    depth: the span at which gradient and target were there.
    error: (n,), the mean error, in nats, that each node has for itself; NaN where it has none.
    energy: state (n, B, ...) -> (n, B), each sample's own error at another state.
    """

    nodes: tuple[int, ...]
    prior: Tensor
    gradient: Tensor
    target: Tensor
    depth: int
    error: Tensor
    energy: Callable[[Tensor], Tensor] | None = None


class _AttachGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor, count: int, *tensors_and_gradients: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors_and_gradients[count:])
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]  (the decorator hides the name ctx)
        gradients = tuple(grad_outputs[0] * gradient for gradient in ctx.saved_tensors)
        return (None, None, *gradients, *(None for _ in gradients))


def attach_gradients(value: Tensor, tensors: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """A scalar with the given value whose gradients in ``tensors`` are already known.

    Credit walks the backward graph of an arc once, for the state and for the parameters; this hands the parameters' share
    to the loss without a second walk.
    """
    return _AttachGradients.apply(value.detach(), len(tensors), *tensors, *gradients)


class Trace:
    """One training step in the making.

    Args:
        network: the network to train.
        stages: its blocks, cut into the stages that are the nodes.
        rule: the family and variances.
        x: the input of embed.
        y: the labels, as the rule's loss takes them.

    Attributes:
        tokens: tokens (pixels) of a state, 1 if it has features only.
        boundary: what the children of a node read, (B, ...), per node from 0 on.
        gradient, target: fields of the corrections, (B, ...), per corrected node.
        terms: the losses so far, each with the nodes, or the name of the part beside them, that it belongs to.
        last: the last node of a path that was evaluated in one graph, and its state (B, ...).
        labels: (n, B, ...), or a nest of such tensors: those of the first n nodes, where every node works on another
            mini-batch than the next.
        head_state: (B, ...), the estimate of the last state that the head is to see, if it is not the last node's output.
        jumped: what predictors of states have computed, with graph, by the stages it is of.
        defect: how far the last sweep still moved the states, relative to their norm.
        pulls_back: whether credit pulls gradients back through waves; their inputs are then leaves.
        clock: the span at which the last parallel sweep over all stages ended.
        at_end: what is to be done once the step is complete.
        diagnosis: whether the step is only looked at; its states are to be those of training as far as that can be.
        observer: is shown every value that credit differentiates, with its nodes; for the locality audit.
        work, span: the cost so far.
    """

    def __init__(self, network: TreeNetwork, stages: Stages, rule: Rule, x: Any, y: Any) -> None:
        self.network = network
        self.stages = stages
        self.tree = stages.tree
        self.engine = stages.engine
        self.rule = rule
        self.x = x
        self.y = y
        embedded = network.embed(x)
        check_tensor("embed", embedded)
        dim = network.features(embedded)
        self.family: Family = Gaussian(rule.variance, dim) if rule.family == "gaussian" else FAMILIES[rule.family](dim)
        self.tokens = self._count_tokens(embedded)
        self.boundary: dict[int, Tensor] = {0: embedded}
        self.gradient: dict[int, Tensor] = {}
        self.target: dict[int, Tensor] = {}
        self.waves: list[Wave] = []
        self.corrections: list[Correction] = []
        self.terms: list[tuple[tuple[int, ...] | str, Tensor]] = []
        self.last: tuple[int, Tensor] | None = None
        self.labels: Any = None
        self.head_state: Tensor | None = None
        self.jumped: list[tuple[tuple[int, ...], Evaluation]] = []
        self.defect: Tensor | None = None
        self.pulls_back = False
        self.clock = 0
        self.at_end: list[Callable[[], None]] = []
        self.diagnosis = False
        self.observer: Callable[[tuple[int, ...], Tensor], None] | None = None
        self.work = 0
        self.span = 0
        self._outputs: dict[int, Tensor] = {}
        self._depth: dict[str, dict[int, int]] = {"boundary": {0: 0}, "output": {}, "target": {}}

    def depth(self, what: str, nodes: Sequence[int]) -> int:
        """The span at which every boundary, output or target of these nodes was there."""
        return max(self._depth[what][n] for n in nodes)

    def count(self, evaluations: int, depth: int) -> None:
        """Counts evaluations made at once, whose results are there at span ``depth``."""
        self.work += evaluations
        self.span = max(self.span, depth)

    def evaluate(self, nodes: Sequence[int], parents: Sequence[int]) -> list[Wave]:
        """Evaluates blocks on the boundaries of their parents, as many at once as the engine can."""
        parent_of = dict(zip(nodes, parents, strict=True))
        waves = []
        for group in self.engine.groups(nodes):
            above = tuple(parent_of[n] for n in group)
            inputs = stack([self.boundary[p] for p in above])
            waves.append(self.add_wave(group, above, inputs, self.depth("boundary", above)))
        return waves

    def add_wave(self, nodes: tuple[int, ...], parents: tuple[int, ...], inputs: Tensor, depth: int) -> Wave:
        """Evaluates the blocks of one group on inputs (n, B, ...) that were there at ``depth``."""
        depth += self.stages.depth(nodes)
        if self.pulls_back:
            inputs = inputs.detach().requires_grad_()
        wave = Wave(nodes, parents, inputs, self.engine(nodes, inputs), depth)
        self.count(self.stages.size(nodes), depth)
        self._outputs.update(zip(nodes, wave.evaluation.outputs.unbind(0), strict=True))
        self._depth["output"].update(dict.fromkeys(nodes, depth))
        self.waves.append(wave)
        return wave

    def sweep(self, inputs: Tensor) -> Tensor:
        """Evaluates all stages at once, without graph, on inputs (S, B, ...); returns the outputs, of that shape."""
        outputs = self.peek(self.stages.nodes, inputs)
        self.clock += self.stages.depth(self.stages.nodes)
        self.count(self.stages.size(self.stages.nodes), self.clock)
        return outputs

    def peek(self, nodes: tuple[int, ...], inputs: Tensor) -> Tensor:
        """Evaluates these stages at once, without graph and uncounted, on inputs (n, B, ...); returns the outputs."""
        parts = []
        with torch.no_grad():
            for positions in self.engine.partition(nodes):
                group = tuple(nodes[p] for p in positions)
                parts.append((positions, self.engine(group, inputs[positions]).outputs))
        return assemble(parts)

    def pull_back(self, credit: Tensor, depth: int) -> tuple[Tensor, int]:
        """Pulls gradients at the outputs of all stages, (S, B, ...), there at ``depth``, back to their inputs.

        Returns:
            the gradients at the inputs, (S, B, ...), and the span at which they are there.
        """
        parts = []
        for wave in self.waves:
            positions = [n - 1 for n in wave.nodes]
            (at_inputs,) = torch.autograd.grad(
                wave.evaluation.outputs, wave.inputs, credit[positions], retain_graph=True
            )
            parts.append((positions, at_inputs))
        pulled = assemble(parts)
        depth += self.stages.depth(self.stages.nodes)
        self.count(self.stages.size(self.stages.nodes), depth)
        return pulled, depth

    def evaluate_in_order(self, *, carry_gradient: bool) -> None:
        """Evaluates one stage after the other, as waves; what each hands on carries its graph or not."""
        for n in self.stages.nodes:
            (wave,) = self.evaluate([n], [n - 1])
            outputs = wave.evaluation.outputs
            self.set_boundary(wave, outputs if carry_gradient else outputs.detach(), wave.depth)

    def evaluate_path(self, path: Path) -> None:
        """Evaluates blocks one after the other from node 0 on, in one graph, and counts the walk back through it."""
        state = self.boundary[0]
        for length, n in enumerate(path, 1):
            block = self.network.blocks[n - 1]
            output = block(state)
            check_shape(f"block {n}", output, state)
            self.count(1, length)
            back = 2 * len(path) + 1 - length
            if any(p.requires_grad for p in block.parameters()):
                self.count(1, back)
            if state.requires_grad:
                self.count(1, back)
            state = output
        self.last = path[-1], state

    def place(self, node: int, state: Tensor) -> None:
        """Lays down a state (B, ...) that the children of a node will read, and that was there from the start."""
        self.boundary[node] = state
        self._depth["boundary"][node] = 0

    def exchange(self, x: Any, y: Any) -> None:
        """Puts another batch in the place of the one at hand."""
        self.x, self.y = x, y
        self.place(0, self.network.embed(x))
        self.tokens = self._count_tokens(self.boundary[0])

    def _count_tokens(self, embedded: Tensor) -> int:
        return embedded[0].numel() // embedded.shape[self.family.dim]

    def set_boundary(self, wave: Wave, boundary: Tensor, depth: int) -> None:
        """What the children of a wave's nodes will read, (n, B, ...), there at span ``depth``."""
        self.boundary.update(zip(wave.nodes, boundary.unbind(0), strict=True))
        self._depth["boundary"].update(dict.fromkeys(wave.nodes, depth))

    def outputs(self, nodes: tuple[int, ...]) -> Tensor:
        """What the blocks of these nodes computed, (n, B, ...), without graph."""
        for wave in self.waves:
            if wave.nodes == nodes:
                return wave.evaluation.outputs.detach()
        return stack([self._outputs[n].detach() for n in nodes])

    def add_correction(self, correction: Correction) -> None:
        """Records the credit of some nodes."""
        self.corrections.append(correction)
        self.gradient.update(zip(correction.nodes, correction.gradient.unbind(0), strict=True))
        self.target.update(zip(correction.nodes, correction.target.unbind(0), strict=True))
        self._depth["target"].update(dict.fromkeys(correction.nodes, correction.depth))

    def count_backward(self) -> None:
        """Counts the backward pass through the states' graph that ``loss.backward()`` is going to make.

        A wave is walked once: its parameters always, its inputs if they carry a graph (the embedded input does; other
        boundaries do if the scope is the tree), and the states inside its stages. The engine's call is one operation, so
        all of its inputs are walked then.
        """
        arrived = dict(self._depth["target"])
        for wave in reversed(self.waves):
            depths = [arrived[n] for n in wave.nodes if n in arrived]
            if not depths:
                continue
            blocks = self.stages.size(wave.nodes)
            depth = max(depths) + self.stages.depth(wave.nodes)
            if wave.evaluation.parameters:
                self.count(2 * blocks - len(wave.nodes), depth)
            if wave.inputs.requires_grad and not self.pulls_back:
                self.count(len(wave.nodes) if wave.evaluation.parameters else blocks, depth)
                for parent in wave.parents:
                    if self.boundary[parent].requires_grad:
                        arrived[parent] = max(arrived.get(parent, 0), depth)


def check_batch(rule: str, now: Tensor, before: Tensor) -> None:
    """Of rules that hold several mini-batches at once.

    Raises:
        ValueError: the embedded input has another shape than the step before's.
    """
    if now.shape != before.shape:
        raise ValueError(
            f"{rule} needs batches of one size: states are {tuple(now.shape)} now and were {tuple(before.shape)} before; "
            "drop the last, short batch of an epoch (DataLoader(..., drop_last=True)), or call objective.reset() to go on "
            "with batches of another size"
        )


def assemble(parts: Sequence[tuple[Sequence[int], Tensor]]) -> Tensor:
    """Rows 0, 1, .. of a tensor from parts that hold some of them each; under autocast their types may differ."""
    rows = {p: row for positions, values in parts for p, row in zip(positions, values.unbind(0), strict=True)}
    return torch.stack([rows[p] for p in range(len(rows))])


def per_sample(values: Tensor) -> Tensor:
    """Averages over tokens: (n, B, ...) to (n, B)."""
    return values.flatten(2).mean(2) if values.ndim > 2 else values


def wide(values: Tensor) -> Tensor:
    """At least float32: errors of half-precision states are summed over many features."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
