"""Scan: the chain's states and gradients at all stages at once, by parallel sweeps that correct a guess.

The sweep of states, along the skip path, is the identity-Newton iteration of SNLP (arXiv 2605.17842), which is there for
inference; the sweep of credit is Highway-BP's (arXiv 2501.17086), which walks exact states back. Beside them scan has
guesses to start from (the batch's own states with older weights, a running mean, predictors), stages of several blocks,
both sweeps in one step of training, and an end by tolerance.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from hbll.calls import check_shape
from hbll.carry import Carry
from hbll.cut import cut
from hbll.engine import stack
from hbll.losses import Loss, cross_entropy, wide
from hbll.modes import evaluating
from hbll.names import check_choice, check_number
from hbll.network import Chain
from hbll.prefix import Coarse, correct, correct_transposed, defect
from hbll.rule import StageLoss, Step, attach_gradients
from hbll.rules.composed import (
    Batch,
    Composed,
    Credit,
    Cut,
    EngineChoice,
    Front,
    States,
    Targets,
    Walk,
    count_walks,
    train_head,
)
from hbll.rules.guess import Guess, Guessed, make_guess

__all__ = ["Scan", "ScanCredit", "ScanStates"]


class ScanStates(States):
    """All stages at once, on guesses of their inputs that parallel sweeps correct.

    A sweep evaluates every stage on the guessed output of the one before and carries the disagreement on to all later
    stages, along their skip connections, by a prefix sum. After as many sweeps as there are stages the states are the
    chain's own; a few suffice where blocks are near the identity. The last sweep keeps its graph.

    Args: as of ``Scan``.
    """

    def __init__(
        self, guess: Guess, sweeps: int, tolerance: float | None, coarse: Coarse, consistency: float = 0.0
    ) -> None:
        super().__init__()
        self.guess = guess
        self.label_waits = guess.waits
        self.sweeps = sweeps
        self.tolerance = tolerance
        self.coarse: Coarse = coarse
        self.consistency = consistency

    @property
    def in_flight(self) -> bool:
        return self.guess.in_flight

    def fronts(self, cut: Cut, batch: Batch | None, targets: Targets, step: Step) -> Iterator[Front]:
        guessed: Guessed = self.guess(cut, batch, step)
        due = guessed.batch
        states, clock = self.sweep(cut, due, guessed.states, self.sweeps - 1, self.tolerance, guessed.clock, step)
        inputs = _inputs(due, states, cut)
        given = [due.state, *inputs[1:].unbind(0)]  # the first with the way back to the embed
        fronts, rows = [], {}
        for group in cut.engine.partition(cut.nodes, given):
            nodes = tuple(cut.nodes[p] for p in group)
            front = cut.front(nodes, (), stack([given[p] for p in group]), [due] * len(nodes), clock, step)
            check_shape(cut.stages[nodes[0] - 1].title, front.outputs[0], inputs[0])
            fronts.append(front)
            rows.update(zip(group, front.outputs.unbind(0), strict=True))
        corrected = correct(inputs, torch.stack([rows[p] for p in range(cut.last)]), self.coarse)
        step.defect = defect(corrected[: len(states)], states)
        beside = tuple(self.guess.learn(cut, guessed, corrected, step))
        if self.consistency and (self.training or step.look):
            start = self.guess.cold(cut, due, step) if self.guess.waits else guessed.states
            beside += (self._consistent(cut, due, start, corrected, fronts[0].depth, step),)
        for front in fronts:
            yield replace(front, states=corrected[[n - 1 for n in front.stages]], beside=beside)
            beside = ()

    def sweep(
        self,
        cut: Cut,
        batch: Batch,
        states: Tensor,
        sweeps: int,
        tolerance: float | None,
        clock: int,
        step: Step,
    ) -> tuple[Tensor, int]:
        """The outputs h_1 .. h_S of all stages, (S, B, ...), after that many sweeps without graph from guessed ones, and the
        span at which they are there."""
        for _ in range(sweeps):
            inputs = _inputs(batch, states, cut)
            outputs = cut.peek(cut.nodes, inputs.unbind(0), [batch] * cut.last)
            clock += cut.depth(cut.nodes)
            step.count(cut.size(cut.nodes), clock)
            last, states = states, correct(inputs, torch.stack(outputs), self.coarse)
            if tolerance is not None and defect(states[: len(last)], last) <= tolerance:
                break
        return states, clock

    def _consistent(self, cut: Cut, batch: Batch, start: Tensor, states: Tensor, clock: int, step: Step) -> StageLoss:
        """The loss by which stages learn to be near their states, (S, B, ...), after one sweep from a start: the mean
        over stages of ||one sweep's state - state|| / ||state||, times its weight."""
        inputs = _inputs(batch, start, cut)
        outputs = cut.outputs(cut.nodes, inputs.unbind(0), [batch] * cut.last)
        step.count(cut.size(cut.nodes), cut.depth(cut.nodes))
        swept = correct(inputs, torch.stack(outputs), self.coarse)
        # The first stage's is exact: of rounding alone the norm would have a gradient as large as of any other difference.
        off, size = (wide(values[1:]).flatten(1).norm(dim=1) for values in (swept - states, states))
        value = self.consistency * (off / size).sum() / cut.last
        parameters = list(dict.fromkeys(p for stage in cut.stages for p in stage.parameters() if p.requires_grad))
        gradients = torch.autograd.grad(value, parameters, materialize_grads=True) if parameters else ()
        count_walks([Walk(cut.nodes, (), bool(parameters), False)], dict.fromkeys(cut.nodes, clock), cut, step)
        return StageLoss("consistency", attach_gradients(value, parameters, gradients))

    def carries(self) -> Mapping[str, Carry]:
        return self.guess.carries()

    def auxiliary(self, stage: int) -> list[nn.Module]:
        return self.guess.auxiliary(stage)


def _inputs(batch: Batch, states: Tensor, cut: Cut) -> Tensor:
    return torch.cat([batch.state.detach().unsqueeze(0), states[: cut.last - 1]])


class ScanCredit(Credit):
    """Gradients at all stages' outputs at once, by sweeps of vector-Jacobian products.

    Every stage starts from the gradient at the head. A sweep pulls all of them back through their stages and carries the
    disagreement on to all earlier stages, along the skip connections, by a suffix sum. After as many sweeps as there are
    stages the gradients are exact for the states at hand.

    Args: as of ``Scan``.
    """

    pulls_back = True

    def __init__(self, loss: Loss, sweeps: int, tolerance: float | None, coarse: Coarse) -> None:
        super().__init__()
        self.loss = loss
        self.sweeps = sweeps
        self.tolerance = tolerance
        self.coarse: Coarse = coarse

    def losses(self, fronts: Iterator[Front], cut: Cut, targets: Targets, step: Step) -> Iterator[StageLoss]:
        waves = list(fronts)
        last = next(wave for wave in waves if cut.last in wave.stages)
        estimate = last.outputs if last.states is None else last.states
        batch = last.batches[0]
        at_label, at_head = train_head(self.loss, cut, estimate[last.stages.index(cut.last)], batch, step)
        credit = at_head.expand(cut.last + 1, *at_head.shape)  # b_0 .. b_S
        depth = max(wave.depth for wave in waves)
        for _ in range(self.sweeps):
            pulled, depth = self._pulled(cut, waves, credit[1:], depth, step)
            before = credit
            credit = torch.cat([correct_transposed(before[1:], pulled, self.coarse), at_head.unsqueeze(0)])
            if self.tolerance is not None and defect(credit, before) <= self.tolerance:
                break
        through = self._through(waves, at_label) if step.look else {}
        yield replace(at_label, through=through.get(cut.last, ()))
        if batch.state.requires_grad:
            zero = credit.new_zeros(())
            yield StageLoss("embed", attach_gradients(zero, [batch.state], [credit[0]]))
        count_walks(
            [replace(Walk.of(wave), inputs=False) for wave in waves], dict.fromkeys(cut.nodes, depth), cut, step
        )
        while waves:
            wave = waves.pop()
            trained = (*wave.evaluation.parameters, *batch.context_leaves)
            if trained:
                own = credit[list(wave.stages)]
                gradients = torch.autograd.grad(
                    wave.evaluation.outputs, trained, own, materialize_grads=True, retain_graph=step.look
                )
                value = attach_gradients(own.new_zeros(()), trained, gradients)
                yield StageLoss(wave.title, value, through=through.get(wave.stages[0], ()))
            del wave

    @staticmethod
    def _pulled(cut: Cut, waves: Sequence[Front], credit: Tensor, depth: int, step: Step) -> tuple[Tensor, int]:
        """Gradients at the outputs of all stages, (S, B, ...), pulled back to their inputs, and the span at which they are
        there."""
        rows: dict[int, Tensor] = {}
        for wave in waves:
            own = credit[[n - 1 for n in wave.stages]]
            (at_inputs,) = torch.autograd.grad(wave.evaluation.outputs, wave.inputs, own, retain_graph=True)
            rows.update(zip(wave.stages, at_inputs.unbind(0), strict=True))
        depth += cut.depth(cut.nodes)
        step.count(cut.size(cut.nodes), depth)
        return torch.stack([rows[n] for n in cut.nodes]), depth

    def _through(self, waves: Sequence[Front], at_label: StageLoss) -> dict[int, tuple[Tensor, ...]]:
        """What each stage's credit was carried back through: the head and, if there are sweeps, all later stages."""
        return {
            wave.stages[0]: (
                at_label.value,
                *(w.evaluation.outputs for w in waves if self.sweeps and w.stages[0] > wave.stages[0]),
            )
            for wave in waves
        }


class Scan(Composed):
    """Sweeps of states and credit, at all stages at once; what stages move along is close to backpropagation's gradient.

    Args:
        network: the network to train; blocks keep the shape of the state, and a skip around each makes a few sweeps do.
        sweeps: evaluations of all stages that correct the guess, the last one, with graph, included; at most so many if
            there is a tolerance.
        credit_sweeps: sweeps of credit; at most so many if there is a tolerance.
        tolerance: sweeps, of states and of credit, end as soon as one moves them by less than this, relative to their norm.
        guess: where the sweeps of states start: the batch's own states, computed ahead with the weights of the steps before
            (``ahead``); a running ``mean`` over steps; or predictors with parameters of their own, a ``tree`` of them or
            each on the embedded input (``star``).
        jumps: the blocks of the predictors, one per stage; by default fresh copies of each stage's last block.
        coarse: how a sweep carries a correction across a stage: unchanged, as ``skip`` connections do, or not at all.
        leak: the share of a correction, of states and of credit, that skip connections lose at each stage; sweeps that
            diverge may converge with some (SNLP).
        consistency: weight of a loss by which stages learn to be near their states after one sweep from a cold start, the
            one of ``predict`` (SNLP's regulariser): the mean over stages of ||one sweep's state - state|| / ||state||.
        stage, rim, loss, engine: as of ``Composed``.

    Raises:
        ValueError: an option has no such value.
    """

    def __init__(
        self,
        network: Chain,
        *,
        stage: int | Sequence[int] = 1,
        sweeps: int = 3,
        credit_sweeps: int = 3,
        tolerance: float | None = None,
        guess: Literal["ahead", "mean", "tree", "star"] = "ahead",
        jumps: Sequence[nn.Module] = (),
        coarse: Literal["skip", "none"] = "skip",
        leak: float = 0.0,
        consistency: float = 0.0,
        rim: float = 0.0,
        loss: Loss = cross_entropy,
        engine: EngineChoice = "auto",
    ) -> None:
        check_number("sweeps", sweeps, least=1)
        check_number("credit_sweeps", credit_sweeps, least=0)
        check_choice("guess", guess, ("ahead", "mean", "tree", "star"))
        check_choice("coarse", coarse, ("skip", "none"))
        if tolerance is not None:
            check_number("tolerance", tolerance, least=0.0)
        check_number("leak", leak, least=0.0)
        check_number("consistency", consistency, least=0.0)
        if leak > 1 or (leak and coarse == "none"):
            raise ValueError(f"leak is at most 1, and of coarse='skip'; got {leak} with coarse={coarse!r}")
        carried: Coarse = 1.0 - leak if coarse == "skip" else None
        start = make_guess(guess, cut(network, stage), sweeps + credit_sweeps + 1, jumps, engine)
        super().__init__(
            network,
            ScanStates(start, sweeps, tolerance, carried, consistency),
            ScanCredit(loss, credit_sweeps, tolerance, carried),
            stage=stage,
            rim=rim,
            loss=loss,
            engine=engine,
        )

    @property
    def input_waits(self) -> bool:
        return cast("ScanStates", self.states).guess.waits

    @torch.no_grad()
    def predict(self, x: Any, sweeps: int) -> Any:
        """The head's output of the states after so many sweeps: an anytime readout of the chain, which it becomes after as
        many sweeps as there are stages. Sweeps start from the rule's guess; from the embedded input if that is computed
        ahead.

        Raises:
            ValueError: the number is negative.
        """
        check_number("sweeps", sweeps, least=0)
        with evaluating(self):  # running statistics, and what is kept from step to step, stay as they are
            cut, step = self.evaluated, Step()
            batch = Batch.of(self.network, x, None, step)
            assert isinstance(self.states, ScanStates)
            start = self.states.guess.cold(cut, batch, step)
            states, _ = self.states.sweep(cut, batch, start, sweeps, None, 0, step)
            return self.network.read(states[-1], batch.context)
