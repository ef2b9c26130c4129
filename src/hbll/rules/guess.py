"""First guesses of the chain's states, which sweeps then correct: a running mean, predictors of one level or a tree, or the
states that the batch had a step before."""

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hbll.calls import check_shape
from hbll.carry import Carry, own_copy
from hbll.cut import Stage, fresh_copy
from hbll.engine import Engine, Evaluation, make_engine, stack
from hbll.losses import wide
from hbll.modes import still_statistics, tracking_norms
from hbll.rule import StageLoss, Step, attach_gradients
from hbll.rules.composed import Batch, Choice, Cut, EngineChoice
from hbll.tree import Tree

__all__ = ["AheadGuess", "Guess", "Guessed", "MeanGuess", "StarGuess", "TreeGuess", "make_guess"]


@dataclass(frozen=True)
class Guessed:
    """Where sweeps start."""

    batch: Batch
    """The mini-batch that the step learns from."""
    states: Tensor
    """The guessed outputs h_1 .. h_S of all stages, (S, B, ...), without graph; without h_S if none starts there."""
    clock: int
    """The span at which they were there."""
    predicted: tuple[tuple[tuple[int, ...], Evaluation], ...] = ()
    """What predictors computed, with graph, by the stages it is of."""


class Guess(Choice):
    """What every guess offers."""

    waits = False
    """Whether mini-batches wait for their turn."""

    @abstractmethod
    def forward(self, cut: Cut, batch: Batch | None, step: Step) -> Guessed:
        """The guess for a batch, or for another whose turn it is."""

    def cold(self, cut: Cut, batch: Batch, step: Step) -> Tensor:
        """The states, (S, B, ...), for a batch that nothing is kept of and whose states are not to be computed one after the
        other."""
        return self(cut, batch, step).states

    def learn(self, cut: Cut, guessed: Guessed, states: Tensor, step: Step) -> Iterator[StageLoss]:
        """Learns from the corrected outputs, (S, B, ...)."""
        return iter(())


class MeanGuess(Guess):
    """A running mean, over steps, of what the stages add to the embedded input: the same for every sample."""

    momentum = 0.1
    """The weight of the newest batch, as in batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = Carry()
        """(S, ...)."""

    def forward(self, cut: Cut, batch: Batch | None, step: Step) -> Guessed:
        assert batch is not None  # nothing is ever in flight
        embedded, mean = batch.state.detach(), self.mean.on(batch.state.device)
        if mean is None:
            return Guessed(batch, embedded.expand(cut.last, *embedded.shape), 0)
        return Guessed(batch, embedded + mean.unsqueeze(1), 0)

    def learn(self, cut: Cut, guessed: Guessed, states: Tensor, step: Step) -> Iterator[StageLoss]:
        newest, mean = (states - guessed.batch.state.detach()).mean(1), self.mean.on(states.device)
        self.mean.leave(newest if mean is None else torch.lerp(mean, newest, self.momentum))
        return iter(())

    def carries(self) -> Mapping[str, Carry]:
        return {"mean": self.mean}


class TreeGuess(Guess):
    """A binary tree over the borders of the stages whose nodes own a jump block each: T_n = jump_n(T_left(n)).

    The jumps are extra parameters, used in training only, that learn to predict the corrected states by regression.

    Args:
        jumps: one per stage.
        choice: how those of a level are evaluated.
    """

    largest_gradient = 1.0
    """The norm to which the gradient of all jumps together is clipped."""

    def __init__(self, jumps: Sequence[nn.Module], choice: EngineChoice) -> None:
        super().__init__()
        self.jumps = nn.ModuleList(jumps)
        self.choice: EngineChoice = choice
        self.engine = self._engine()

    def _engine(self) -> Engine:
        return make_engine(list(self.jumps), [f"jump {n}" for n in range(1, len(self.jumps) + 1)], self.choice)

    @staticmethod
    def levels(tree: Tree) -> list[dict[int, int]]:
        """The nodes of every level, each with the node whose state its jump takes; 0 is the embedded input."""
        return [{n: tree.left(n) for n in level} for level in tree.levels]

    def forward(self, cut: Cut, batch: Batch | None, step: Step) -> Guessed:
        assert batch is not None  # nothing is ever in flight
        found = {0: batch.state.detach()}
        levels = self.levels(cut.tree)
        predicted = []
        for level, parents in enumerate(levels, 1):
            for group in self.engine.groups(list(parents), [found[left] for left in parents.values()]):
                inputs = stack([found[parents[n]] for n in group])
                with torch.set_grad_enabled(self.training or step.look):
                    evaluation = self.engine(group, inputs, [batch.context] * len(group))
                check_shape(f"jump {group[0]}", evaluation.outputs[0], inputs[0])
                step.count(len(group), level)
                predicted.append((group, evaluation))
                found.update(zip(group, evaluation.outputs.detach().unbind(0), strict=True))
        return Guessed(batch, torch.stack([found[n] for n in cut.nodes]), len(levels), tuple(predicted))

    def learn(self, cut: Cut, guessed: Guessed, states: Tensor, step: Step) -> Iterator[StageLoss]:
        parameters = [p for p in self.jumps.parameters() if p.requires_grad]
        if not ((self.training or step.look) and parameters):
            return
        errors = [
            F.mse_loss(wide(evaluation.outputs), wide(states[[n - 1 for n in group]]), reduction="sum")
            for group, evaluation in guessed.predicted
        ]
        error = torch.stack(errors).sum() / states.numel()
        gradients = torch.autograd.grad(error, parameters, materialize_grads=True)
        norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients]))
        scale = (self.largest_gradient / norm.clamp_min(1e-12)).clamp(max=1.0)
        step.count(cut.last, 0)  # products for parameters, long before the last sweep ends
        yield StageLoss("jumps", attach_gradients(error, parameters, [g * scale for g in gradients]))

    def auxiliary(self, stage: int) -> list[nn.Module]:
        return [self.jumps[stage - 1]]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "engine": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.engine = self._engine()  # of the copied jumps


class StarGuess(TreeGuess):
    """The same with a single level: every jump takes the embedded input, T_n = jump_n(z_0)."""

    @staticmethod
    def levels(tree: Tree) -> list[dict[int, int]]:
        return [dict.fromkeys(tree.chain, 0)]


class AheadGuess(Guess):
    """The batch's own states, computed ahead: while a step's evaluations run one after the other, batches that came in
    before pass as many stages with the same weights.

    A batch is trained on D steps after it came in. Its states are those of weights at most D steps old; the sweeps bring
    them up to date. In evaluation mode, and in the first D steps, the batch at hand passes all stages in order; where a step
    is only looked at it is of the batch that is due.

    Args:
        evaluations: how many a step waits for, if no tolerance ends its sweeps before.
    """

    waits = True

    def __init__(self, evaluations: int) -> None:
        super().__init__()
        self.evaluations = evaluations
        self.flight = Carry()
        """``x``, ``y``, ``context`` and the ``states`` so far, from the embedded input on, of every batch in flight, oldest
        first."""

    def forward(self, cut: Cut, batch: Batch | None, step: Step) -> Guessed:
        delay = math.ceil((cut.last - 1) / self.evaluations)
        if batch and (not delay or not (self.training or step.look)):
            return self._in_order(cut, batch, step)
        # A rule that took up another's flight, of fewer sweeps, may find more batches there than it waits for.
        flight = (self.flight.on(cut.device) or [])[-delay:]
        turns = math.ceil((cut.last - 1) / delay)
        if batch:
            newest = {"x": batch.x, "y": batch.y, "context": dict(batch.context), "states": [batch.state]}
            flight.append(own_copy(newest))
        else:  # no new one will push the first one on
            turns = max(turns, cut.last - len(flight[0]["states"]))
        full = len(flight) > delay or not batch
        if step.look:
            flight = flight[:1]  # the others, which may be of another size, stay where they are
        self._advance(cut, flight, turns, step)
        first = flight[0]
        due = full and len(first["states"]) == cut.last
        if not step.look:
            self.flight.leave(flight[1:] if due else flight)
        if batch and not due:
            return self._in_order(cut, batch, step)
        step.batch = first["x"], first["y"]
        with still_statistics(tracking_norms(cut.network.embed)):  # which has seen the batch
            own = replace(Batch.of(cut.network, *step.batch, step), late=True)
        return Guessed(own, torch.stack(first["states"][1:]), 0)

    @staticmethod
    def _advance(cut: Cut, flight: Sequence[dict[str, Any]], turns: int, step: Step) -> None:
        """Lets every batch in flight pass that many stages on."""
        for turn in range(1, turns + 1):
            moving = {len(left["states"]): left for left in flight if len(left["states"]) < cut.last}
            if moving:
                nodes = sorted(moving)
                inputs = [moving[n]["states"][-1] for n in nodes]
                batches = [_in_flight(moving[n]) for n in nodes]
                outputs = cut.peek(nodes, inputs, batches)
                step.count(cut.size(nodes), turn * cut.depth(cut.nodes))
                for n, state in zip(nodes, outputs, strict=True):
                    moving[n]["states"].append(state)

    @staticmethod
    def _in_order(cut: Cut, batch: Batch, step: Step) -> Guessed:
        state, states, clock = batch.state.detach(), [], 0
        for n in cut.nodes:
            (state,) = cut.peek([n], [state], [batch])
            states.append(state)
            clock += cut.depth([n])
            step.count(cut.size([n]), clock)
        return Guessed(batch, torch.stack(states), clock)

    def cold(self, cut: Cut, batch: Batch, step: Step) -> Tensor:
        embedded = batch.state.detach()
        return embedded.expand(cut.last, *embedded.shape)

    @property
    def in_flight(self) -> bool:
        return bool(self.flight.nest)

    def carries(self) -> Mapping[str, Carry]:
        return {"ahead": self.flight}


def _in_flight(left: Mapping[str, Any]) -> Batch:
    return Batch(left["x"], left["y"], left["states"][0], left["context"])


def make_guess(
    kind: str, stages: Sequence[Stage], evaluations: int, jumps: Sequence[nn.Module], choice: EngineChoice
) -> Guess:
    """The guess of that name for some stages; jumps are by default fresh copies of each stage's last block.

    Raises:
        ValueError: there are not as many jumps as stages, or jumps for a guess that has none.
    """
    if kind in ("ahead", "mean"):
        if jumps:
            raise ValueError(f"jumps are for guess='tree' or guess='star', and do nothing with guess={kind!r}")
        return AheadGuess(evaluations) if kind == "ahead" else MeanGuess()
    if not all(isinstance(jump, nn.Module) for jump in jumps):
        raise ValueError(f"jumps are modules, one per stage; got {jumps!r}")
    jumps = list(jumps) or [fresh_copy(stage.blocks[-1]) for stage in stages]
    if len(jumps) != len(stages):
        raise ValueError(f"predictors need a jump per stage, {len(stages)}; got {len(jumps)}")
    return TreeGuess(jumps, choice) if kind == "tree" else StarGuess(jumps, choice)
