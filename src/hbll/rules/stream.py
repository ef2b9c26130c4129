"""Stream: the chain's own states, pipelined over steps; credit through each stage's readout, a few jumps to the head.

At step t stage n works on the mini-batch that entered the network n - 1 steps ago: its input is what stage n - 1 left in the
step before. No stage waits for another; on one device they are evaluated in order within the step (``states="chain"``).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from hbll.calls import Context, Readout, check_shape, evaluate, out_of_order
from hbll.carry import Carry, concatenate, map_tensors, own_copy
from hbll.cut import cut
from hbll.engine import Engine, make_engine, stack
from hbll.losses import Loss, cross_entropy, row_means, sample_losses, wide
from hbll.modes import still_statistics
from hbll.names import check_choice, check_number
from hbll.network import Chain
from hbll.rule import Message, StageLoss, Step
from hbll.rules.chain import ChainStates
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
)
from hbll.rules.readouts import Meet, Meeting, Spine, StageReadout, copied, meet, passed, solo

__all__ = ["Greedy", "ReadoutCredit", "Solo", "Stream", "StreamStates"]


class StreamStates(States):
    """Each stage works on what the one before it left in the last step.

    Every step feeds one new mini-batch and evaluates every stage once, all at once; while the pipeline fills, stages without
    input skip the step. Batches may differ in size. In evaluation mode the given batch passes through all stages, one after
    the other, and the pipeline stays as it is.

    Args:
        with_graph: whether the fronts have graphs.
    """

    pipelined = True
    label_waits = True

    def __init__(self, with_graph: bool = True) -> None:
        super().__init__()
        self.with_graph = with_graph
        self.in_order = ChainStates(teach_context=False)
        self.flight = Carry()
        """What stage n - 1 left for stage n, by n: ``state``, (B, ...), with its ``labels`` and ``context``."""

    def fronts(self, cut: Cut, batch: Batch | None, targets: Targets, step: Step) -> Iterator[Front]:
        if not self.training or step.look:
            yield from self.in_order.fronts(cut, batch, targets, step)
            return
        batches = {1: batch} if batch else {}
        labels, context = own_copy((batch.y, dict(batch.context))) if batch else (None, {})
        batches |= {n: _in_flight(**left) for n, left in (self.flight.on(cut.device) or {}).items()}
        active = tuple(batches)
        left: dict[int, dict[str, Any]] = {}
        for group in cut.engine.partition(active, [b.state for b in batches.values()]):
            stages = tuple(active[p] for p in group)
            own = [batches[n] for n in stages]
            with nullcontext() if self.with_graph else torch.no_grad():
                front = cut.front(stages, (), stack([b.state for b in own]), own, 0, step, active)
            for n, b, state in zip(stages, own, front.outputs.unbind(0), strict=True):
                given = (labels, context) if n == 1 else (b.y, b.context)
                left[n + 1] = {"state": state, "labels": given[0], "context": given[1]}
            yield front
            del front
        left.pop(cut.last + 1, None)  # which has reached the head
        self.flight.leave(dict(sorted(left.items())))

    @property
    def in_flight(self) -> bool:
        return bool(self.flight.nest)

    def carries(self) -> Mapping[str, Carry]:
        return {"stream": self.flight}


def _in_flight(state: Tensor, labels: Any, context: Context) -> Batch:
    return Batch(None, labels, state, context, late=True)


class ReadoutCredit(Credit):
    """The gradient of the label's loss through each stage's readout: a few jumps to the head, or less.

    Args:
        loss: the label's loss.
        kind: the spine that readouts pass; None for none.
        depth: how many blocks they pass of every stage of it.
        share: of the stages, as of ``Stream``.
        own: the readouts of all stages but the last, if they are the stages' own and not the network's modules.
    """

    takes_pipelined = True

    def __init__(
        self,
        loss: Loss,
        kind: Spine | None,
        depth: int = 1,
        share: float = 1.0,
        own: Sequence[StageReadout] = (),
    ) -> None:
        super().__init__()
        self.loss = loss
        self.kind: Spine | None = kind
        self.depth = depth
        self.share = share
        self.readouts = nn.ModuleList(own)
        self._ways: dict[EngineChoice, tuple[Cut, _Ways]] = {}  # of stages as they train, and each by itself

    def losses(self, fronts: Iterator[Front], cut: Cut, targets: Targets, step: Step) -> Iterator[StageLoss]:
        lucky: tuple[int, ...] | None = None
        walks, arrivals = [], {}
        for front in fronts:
            lucky = self._drawn(front.active, step) if lucky is None else lucky
            places = [i for i, n in enumerate(front.stages) if n in lucky]
            walks.append(Walk.of(front))
            if places:
                weight = len(front.active) / len(lucky)
                values, arrived = self._values(front, places, cut, step)
                arrivals.update(dict.fromkeys((front.stages[i] for i in places), arrived))
                yield StageLoss(front.title, weight * values.sum() if weight != 1 else values.sum())
                del values
            del front
        count_walks(walks, arrivals, cut, step)

    @property
    def own(self) -> list[StageReadout]:
        """The stages' own readouts, if they have some."""
        return cast("list[StageReadout]", list(self.readouts))

    def _drawn(self, active: tuple[int, ...], step: Step) -> tuple[int, ...]:
        if not self.training or step.look or self.share == 1:
            return active
        count = max(1, round(self.share * len(active)))
        return tuple(active[i] for i in sorted(torch.randperm(len(active))[:count].tolist()))

    def _values(self, front: Front, places: Sequence[int], cut: Cut, step: Step) -> tuple[Tensor, int]:
        """The mean loss at the end of some stages' readouts, (n,), and the span at which their gradients are there."""
        nodes, batches = [front.stages[i] for i in places], [front.batches[i] for i in places]
        outputs = front.evaluation.outputs.unbind(0)
        states = [outputs[i] for i in places]
        engine, ways = self.ways(cut)
        shared = () if self.own else cut.norms
        passing = [ways[n] for n in nodes]
        trained = False
        for jump in range(max(map(len, passing))):
            moving = [i for i, way in enumerate(passing) if jump < len(way)]
            through = [passing[i][jump] for i in moving]
            for group in engine.partition(through, [states[i] for i in moving]):
                rows = [moving[p] for p in group]
                blocks = tuple(through[p] for p in group)
                before = stack([states[i] for i in rows])
                name = engine.names[blocks[0] - 1]
                with out_of_order(name, before[0]), still_statistics(shared):
                    evaluation = engine(blocks, before, [batches[i].context for i in rows])
                check_shape(name, evaluation.outputs[0], before[0])
                trained = trained or bool(evaluation.parameters)
                for i, state in zip(rows, evaluation.outputs.unbind(0), strict=True):
                    states[i] = state
        head = f"stage {nodes[0]}'s copy of the head" if self.own else "the head"
        with out_of_order(head, states[0]) if nodes[0] < cut.last else nullcontext():
            prediction = self._predict(nodes, states, batches, cut)
        labels = concatenate([batch.y for batch in batches])
        values, weights = sample_losses(self.loss, prediction, labels)
        means = row_means(wide(values), weights, len(nodes))
        step.report(nodes, error=means)
        if nodes[-1] == cut.last:
            step.label_loss = means[-1].detach()
        blocks, length = sum(map(len, passing)), max(map(len, passing))
        step.count(blocks, front.depth + length)
        step.count(blocks * (2 if trained else 1), front.depth + 2 * length)
        return means, front.depth + 2 * length

    def ways(self, cut: Cut) -> "_Ways":
        """What the stages' outputs pass."""
        known = self._ways.get(cut.choice)
        if known is None or known[0] is not cut:
            known = self._ways[cut.choice] = cut, self._own_ways(cut) if self.own else self._shared_ways(cut)
        return known[1]

    def _shared_ways(self, cut: Cut) -> "_Ways":
        blocks, engine = cut.network.blocks, cut.engine
        if len(cut.stages) < len(blocks):
            engine = make_engine(list(blocks), [f"block {n}" for n in range(1, len(blocks) + 1)], cut.choice)
        return _Ways(engine, {n: passed(n, cut.stages, self.kind, self.depth) for n in cut.nodes})

    def _own_ways(self, cut: Cut) -> "_Ways":
        blocks: list[nn.Module] = [block for readout in self.own for block in readout.blocks]
        names = [f"a block of stage {n}'s readout" for n, readout in enumerate(self.own, 1) for _ in readout.blocks]
        ends = [0, *accumulate(len(readout.blocks) for readout in self.own)]
        ways = {n: tuple(range(a + 1, b + 1)) for n, (a, b) in enumerate(pairwise(ends), 1)}
        return _Ways(make_engine(blocks, names, cut.choice) if blocks else cut.engine, ways | {cut.last: ()})

    def _predict(self, nodes: Sequence[int], states: Sequence[Tensor], batches: Sequence[Batch], cut: Cut) -> Any:
        """The heads' outputs, one stage's samples after the other's."""
        heads = [self._head(n, cut) for n in nodes]
        if len(set(heads)) == 1 and not cut.norms and not any(batch.context for batch in batches):
            return heads[0](torch.cat(list(states)))
        predictions = []
        for n, head, state, batch in zip(nodes, heads, states, batches, strict=True):
            with still_statistics(cut.norms if head is cut.network.head and n < cut.last else ()):
                predictions.append(evaluate(head, state, batch.context))
        return concatenate(predictions)

    def _head(self, node: int, cut: Cut) -> nn.Module:
        return self.own[node - 1].head if self.own and node < cut.last else cut.network.head

    def auxiliary(self, stage: int) -> list[nn.Module]:
        return [self.own[stage - 1]] if stage <= len(self.own) else []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ways": {}}


class _Ways(NamedTuple):
    engine: Engine
    passed: Mapping[int, tuple[int, ...]]
    """By stage, the blocks of the engine that its output passes."""


class Stream(Composed):
    """The chain's own states, pipelined over steps, and credit through each stage's readout.

    Args:
        network: the network to train; blocks that readouts pass keep the shape of the state.
        states: ``stream``: each stage works on what the one before it left in the last step, for stages on devices of their
            own; ``chain``: in order within the step, the way on one device, in the least memory.
        readout: how a stage's output reaches the label: along a ``spine`` through a few later blocks to the head; by the
            ``head`` alone; or by ``solo``, blocks of the stage's own and the head's last layer of some steps before, read
            only, times a temperature that is learnt (arXiv 2609.35440).
        spine: the stages whose last blocks a spine passes: 1, 3, 7, .. on (``doubling``, the default); the ``right``
            parents; the ``last`` one alone.
        readout_depth: how many blocks a spine passes of each of these stages (1); or how many of its own a solo readout
            has (2).
        copies: whether what a readout passes are copies of the stage's own, which its loss trains alone, so that nothing
            but states and labels goes from stage to stage; else they are the network's blocks and head, which all train.
        refresh: steps after which copies and originals meet, and solo reads the head anew; None for never.
        meet: whether copies and originals become the ``mean`` of all of them, or the copies the ``original``.
        spine_share: share of the stages, drawn anew each step, that receive credit; theirs is scaled up to make up for it.
        stage, rim, loss, engine: as of ``Composed``.

    Raises:
        ValueError: an option has no such value, or does nothing beside the others.
    """

    def __init__(
        self,
        network: Chain,
        *,
        stage: int | Sequence[int] = 1,
        states: Literal["stream", "chain"] = "stream",
        readout: Literal["spine", "head", "solo"] = "spine",
        spine: Spine | None = None,
        readout_depth: int | None = None,
        copies: bool = False,
        refresh: int | None = None,
        meet: Meet = "mean",
        spine_share: float = 1.0,
        rim: float = 0.0,
        loss: Loss = cross_entropy,
        engine: EngineChoice = "auto",
    ) -> None:
        check_choice("states", states, ("stream", "chain"))
        check_choice("readout", readout, ("spine", "head", "solo"))
        check_choice("meet", meet, ("mean", "original"))
        check_number("spine_share", spine_share, above=0)
        if spine_share > 1:
            raise ValueError(f"spine_share is at most 1; got {spine_share}")
        if spine is not None:
            check_choice("spine", spine, ("doubling", "right", "last"))
        for option, value, where in (("spine", spine, ("spine",)), ("readout_depth", readout_depth, ("spine", "solo"))):
            if value is not None and readout not in where:
                raise ValueError(
                    f"{option} is of readout={' or '.join(map(repr, where))}; leave it out for {readout!r}"
                )
        for option, value in (("readout_depth", readout_depth), ("refresh", refresh)):
            if value is not None:
                check_number(option, value, least=1)
        if readout == "solo":
            if copies or meet != "mean":
                raise ValueError("solo's blocks are the stage's own: leave out copies and meet")
            if refresh is None:
                raise ValueError("solo reads the head as it was some steps before: give refresh=1 or more")
        elif refresh is not None and not copies:
            raise ValueError("refresh is of copies that meet their originals: give copies=True too")
        if meet != "mean" and refresh is None:
            raise ValueError("meet says how copies are refreshed: give refresh too")
        kind = (spine or "doubling") if readout == "spine" else None
        depth = readout_depth or (2 if readout == "solo" else 1)
        stages = cut(network, stage)
        own: Sequence[StageReadout] = solo(network, stages, depth) if readout == "solo" else ()
        own = copied(network, stages, kind, depth) if copies else own
        super().__init__(
            network,
            StreamStates() if states == "stream" else ChainStates(),
            ReadoutCredit(loss, kind, depth, spine_share, own),
            stage=stage,
            rim=rim,
            loss=loss,
            engine=engine,
        )
        self.refresh = refresh
        self.meet: Meet = "original" if readout == "solo" else meet
        self.clock = Carry()
        """Steps so far, where something is refreshed."""

    @property
    def own_readouts(self) -> list[StageReadout]:
        """The readouts of all stages but the last, where they are the stages' own."""
        return cast("ReadoutCredit", self.credit).own

    def exit(self, stage: int) -> Readout:
        if self.own_readouts:
            readout = self.own_readouts[stage - 1]
            return self.exit_by(stage, readout, own_blocks=len(readout.blocks))
        credit = cast("ReadoutCredit", self.credit)
        return self.exit_by(stage, self.network.head, passed(stage, self.stages, credit.kind, credit.depth))

    def meetings(self) -> list[Meeting]:
        """The modules that are refreshed, with their copies."""
        return list(Meeting.all(self.network, self.stages, self.own_readouts))

    def losses(self, x: Any, y: Any, step: Step) -> Iterator[StageLoss]:
        if self.refresh and self.training and not step.look:
            time = self.clock.nest or 0
            if time and time % self.refresh == 0:
                for meeting in self.meetings():
                    meet(meeting.original, list(meeting.copies.values()), self.meet)
            self.clock.leave(time + 1)
        yield from super().losses(x, y, step)

    def carries(self) -> Mapping[str, Carry]:
        return {**super().carries(), **({"clock": self.clock} if self.refresh else {})}

    def check_apart(self) -> None:
        if not self.own_readouts and len(self.stages) > 1:
            raise ValueError("the readouts of stream pass blocks of other stages: give copies=True, or readout='solo'")
        if self.rim or cast("ReadoutCredit", self.credit).share < 1:
            raise ValueError("rim and spine_share are of all stages at once: leave them out where each is by itself")

    def stage_losses(
        self, stage: int, given: Message, step: Step, hand_on: Callable[[Message], None]
    ) -> Iterator[StageLoss]:
        self.check_apart()
        cut = self.apart
        batch = Batch(None, given.labels, given.state, given.context)
        if stage == 1:
            batch = Batch.of(self.network, given.state, given.labels, step)
        front = cut.front((stage,), (), batch.state.unsqueeze(0), [batch], 0, step, (stage,))
        if stage < cut.last:
            hand_on(Message(front.outputs[0], batch.y, map_tensors(Tensor.detach, dict(batch.context))))
        for loss in self.credit.losses(iter([front]), cut, {}, step):
            yield replace(loss, leaves=batch.leaves)
        yield from batch.embed_losses()


class Greedy(Stream):
    """Stages that learn by heads of their own (Belilovsky et al., arXiv 1901.08164): the shortest sight, and the least work.

    Args:
        network: the network to train; blocks may change the shape of the state if copies of the head take it.
        readout, copies, options: as of ``Stream``.
    """

    def __init__(
        self,
        network: Chain,
        *,
        readout: Literal["spine", "head", "solo"] = "head",
        copies: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(network, readout=readout, copies=copies, **options)


class Solo(Stream):
    """Stages that learn through blocks of their own and the head's last layer of some steps before (arXiv 2609.35440).

    Args:
        network: the network to train.
        readout, refresh, options: as of ``Stream``.
    """

    def __init__(
        self,
        network: Chain,
        *,
        readout: Literal["spine", "head", "solo"] = "solo",
        refresh: int | None = 1,
        **options: Any,
    ) -> None:
        super().__init__(network, readout=readout, refresh=refresh, **options)
