"""First guesses of the chain's states, which sweeps then correct: a running mean, predictors of one level or a tree, or the
states that the batch had a step before."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hbll.blocks import Engine, make_engine, stack
from hbll.kept import Kept, own_copy
from hbll.network import TreeNetwork
from hbll.rule import Rule
from hbll.stages import Stages, fresh_copy
from hbll.trace import Trace, attach_gradients, check_batch, wide
from hbll.tree import Tree

__all__ = ["GUESSES", "AheadGuess", "Guess", "MeanGuess", "StarGuess", "TreeGuess"]


class Guess(nn.Module):
    """What every guess offers."""

    def prepare(self, network: TreeNetwork, stages: Stages) -> None:
        """Makes the parameters that the guess needs for a network."""

    def forward(self, trace: Trace) -> Tensor:
        """The guessed outputs h_1 .. h_S of all stages, (S, B, ...), without graph; without h_S if none starts there."""
        raise NotImplementedError

    def cold(self, trace: Trace) -> Tensor:
        """The same for a batch that nothing is kept of and whose states are not to be computed one after the other."""
        return self(trace)

    def learn(self, trace: Trace, states: Tensor) -> None:
        """Learns from the corrected outputs, (S, B, ...)."""
        raise NotImplementedError


class MeanGuess(Guess):
    """A running mean, over steps, of what the stages add to the embedded input: the same for every sample."""

    momentum = 0.1
    """The weight of the newest batch, as in batch normalisation."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.mean = Kept()
        """(S, ...)."""

    def forward(self, trace: Trace) -> Tensor:
        embedded = trace.boundary[0].detach()
        mean = self.mean.of(trace)
        if mean is None:
            return embedded.expand(len(trace.stages.nodes), *embedded.shape)
        return embedded + mean.unsqueeze(1)

    def learn(self, trace: Trace, states: Tensor) -> None:
        if self.training:
            newest, mean = (states - trace.boundary[0].detach()).mean(1), self.mean.of(trace)
            self.mean.leave(trace, newest if mean is None else torch.lerp(mean, newest, self.momentum))


class TreeGuess(Guess):
    """A binary tree over the borders of the stages whose nodes own a jump block each: T_n = jump_n(T_left(n)).

    The jumps are extra parameters, used in training only, that learn to predict the corrected states by regression. By
    default a jump is a copy of its stage's last block with fresh parameters.

    Args:
        rule: jumps, the user's own, one per stage.
    """

    largest_gradient = 1.0
    """The norm to which the gradient of all jumps together is clipped."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule
        self.jumps = nn.ModuleList(rule.jumps)
        self.engine: Engine | None = None

    def prepare(self, network: TreeNetwork, stages: Stages) -> None:
        if not self.jumps:
            self.jumps.extend(fresh_copy(network.blocks[numbers[-1] - 1]) for numbers in stages.numbers)
        if len(self.jumps) != len(stages.numbers):
            raise ValueError(f"predictors need a jump per stage, {len(stages.numbers)}; got {len(self.jumps)}")
        self.engine = make_engine(list(self.jumps), [f"jump {n}" for n in stages.nodes], self.rule.engine)

    @staticmethod
    def levels(tree: Tree) -> list[dict[int, int]]:
        """The nodes of every level, each with the node whose state its jump takes; 0 is the embedded input."""
        return [{n: tree.left(n) for n in level} for level in tree.levels]

    def forward(self, trace: Trace) -> Tensor:
        if self.engine is None or len(self.jumps) != len(trace.stages.nodes):
            raise ValueError(
                f"the predictors are not made for these {len(trace.stages.nodes)} stages: call objective.prepare(network) "
                "before the optimizer is made, and take an objective for each network"
            )
        found = {0: trace.boundary[0].detach()}
        levels = self.levels(trace.tree)
        for level, parents in enumerate(levels, 1):
            for group in self.engine.groups(list(parents)):
                with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
                    evaluation = self.engine(group, stack([found[parents[n]] for n in group]))
                trace.count(len(group), level)
                trace.jumped.append((group, evaluation))
                found.update(zip(group, evaluation.outputs.detach().unbind(0), strict=True))
        trace.clock = len(levels)
        return torch.stack([found[n] for n in trace.stages.nodes])

    def learn(self, trace: Trace, states: Tensor) -> None:
        if not self.training:
            return
        errors = [
            F.mse_loss(wide(evaluation.outputs), wide(_rows(states, group)), reduction="sum")
            for group, evaluation in trace.jumped
        ]
        parameters = [p for p in self.jumps.parameters() if p.requires_grad]
        if not parameters:
            return
        error = torch.stack(errors).sum() / states.numel()
        gradients = torch.autograd.grad(error, parameters, materialize_grads=True)
        norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients]))
        scale = (self.largest_gradient / norm.clamp_min(1e-12)).clamp(max=1.0)
        trace.terms.append(("jumps", attach_gradients(error, parameters, [g * scale for g in gradients])))
        trace.count(len(trace.stages.nodes), 0)  # products for parameters, long before the last sweep ends


class StarGuess(TreeGuess):
    """The same with a single level: every jump takes the embedded input, T_n = jump_n(z_0)."""

    @staticmethod
    def levels(tree: Tree) -> list[dict[int, int]]:
        return [dict.fromkeys(tree.chain, 0)]


class AheadGuess(Guess):
    """The batch's own states, computed in the steps before, while those steps' sweeps were made.

    A step waits for K + K_c + 1 evaluations of a stage, one after the other; in this time a batch can pass as many stages.
    So it needs D = ceil((S - 1) / (K + K_c + 1)) steps for all of them, and every batch in flight passes ceil((S - 1) / D)
    stages a step. One whose states are complete takes the place of the batch at hand, which enters: the rule learns from a
    batch D steps after it came in. Its states are those of weights at most D steps old; the sweeps bring them up to date.
    In evaluation mode, and in the first D steps, the batch at hand passes all stages in order; a diagnosis is of the batch
    that is due.

    Args:
        rule: how many evaluations a step waits for, if no tolerance ends its sweeps before.
    """

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.evaluations = rule.sweeps + rule.credit_sweeps + 1
        self.flight = Kept()
        """Input, labels and the states so far, from the embedded input on, of every batch in flight, oldest first."""

    def forward(self, trace: Trace) -> Tensor:
        last = trace.stages.nodes[-1]
        delay = math.ceil((last - 1) / self.evaluations)
        if not delay or not (self.training or trace.diagnosis):
            return self._in_order(trace)
        # A rule that took up another's flight, of fewer sweeps, may find more batches there than it waits for.
        flight = [*(self.flight.of(trace) or [])[-delay:], own_copy((trace.x, trace.y, [trace.boundary[0]]))]
        full = len(flight) > delay
        if trace.diagnosis:
            flight = flight[:1]  # the others, which may be of another size, stay where they are
        self._advance(trace, flight, math.ceil((last - 1) / delay))
        x, y, states = flight[0]
        due = full and len(states) == last
        if self.training:
            self.flight.leave(trace, flight[1:] if due else flight)
        if not due:
            return self._in_order(trace)
        trace.exchange(x, y)
        return torch.stack(states[1:])

    @staticmethod
    def _advance(trace: Trace, flight: Sequence[tuple[Any, Any, list[Tensor]]], turns: int) -> None:
        """Lets every batch in flight pass that many stages on."""
        last = trace.stages.nodes[-1]
        for _, _, states in flight:
            if len(states) < last:
                check_batch("guess='ahead'", trace.boundary[0], states[0])
        for turn in range(1, turns + 1):
            moving = {len(states): states for _, _, states in flight if len(states) < last}
            if moving:
                nodes = tuple(sorted(moving))
                outputs = trace.peek(nodes, torch.stack([moving[n][-1] for n in nodes]))
                trace.count(trace.stages.size(nodes), turn * trace.stages.depth(trace.stages.nodes))
                for n, state in zip(nodes, outputs.unbind(0), strict=True):
                    moving[n].append(state)

    @staticmethod
    def _in_order(trace: Trace) -> Tensor:
        state, states = trace.boundary[0].detach(), []
        for n in trace.stages.nodes:
            state = trace.peek((n,), state.unsqueeze(0)).squeeze(0)
            states.append(state)
            trace.clock += trace.stages.depth([n])
            trace.count(trace.stages.size([n]), trace.clock)
        return torch.stack(states)

    def cold(self, trace: Trace) -> Tensor:
        embedded = trace.boundary[0].detach()
        return embedded.expand(len(trace.stages.nodes), *embedded.shape)

    def learn(self, trace: Trace, states: Tensor) -> None:
        """Nothing: it has no parameters."""


def _rows(states: Tensor, nodes: Sequence[int]) -> Tensor:
    return torch.stack([states[n - 1] for n in nodes])


GUESSES: dict[str, type[Guess]] = {"mean": MeanGuess, "tree": TreeGuess, "star": StarGuess, "ahead": AheadGuess}
