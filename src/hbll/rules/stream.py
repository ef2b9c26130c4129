"""Stream: the chain's own states, pipelined over steps; credit along a spine, a few jumps to the head.

At step t stage n works on the mini-batch that entered the network n - 1 steps ago: its input is what stage n - 1 left in the
step before. No stage waits for another; on one device they are evaluated in order within the step (``states="chain"``).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hbll.carry import Carry, concatenate, own_copy
from hbll.cut import cut, fresh_copy
from hbll.engine import stack
from hbll.losses import Loss, cross_entropy, row_means, sample_losses, wide
from hbll.names import check_choice, check_number
from hbll.network import Chain, Context, check_shape, evaluate, out_of_order
from hbll.rule import StageLoss, Step
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
from hbll.tree import Tree

__all__ = ["Greedy", "SpineCredit", "Stream", "StreamStates", "spine"]

Spine = Literal["doubling", "right", "last", "none"]


class StreamStates(States):
    """Each stage works on what the one before it left in the last step.

    Every step feeds one new mini-batch and evaluates every stage once, all at once; while the pipeline fills, stages without
    input skip the step. Batches may differ in size. In evaluation mode the given batch passes through all stages, one after
    the other, and the pipeline stays as it is.

    Args:
        with_graph: whether the fronts have graphs.
    """

    pipelined = True

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
    return Batch(None, labels, state, context)


class SpineCredit(Credit):
    """The gradient of the label's loss through a few jumps: each stage's output goes on to the head through the last
    blocks of at most log2 S + 1 later stages, which learn to be called from afar.

    Without jumps and with heads of their own the stages learn greedily (Belilovsky et al., arXiv 1901.08164).

    Args:
        loss: the label's loss.
        heads: those of all stages but the last; none for the network's own.
        kind, share: as of ``Stream``.
    """

    takes_pipelined = True

    def __init__(self, loss: Loss, kind: Spine, share: float, heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.loss = loss
        self.kind: Spine = kind
        self.share = share
        self.heads = nn.ModuleList(heads)

    def losses(self, fronts: Iterator[Front], cut: Cut, targets: Targets, step: Step) -> Iterator[StageLoss]:
        lucky: tuple[int, ...] | None = None
        walks, arrivals = [], {}
        for front in fronts:
            lucky = self._drawn(front.active) if lucky is None else lucky
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

    def _drawn(self, active: tuple[int, ...]) -> tuple[int, ...]:
        if not self.training or self.share == 1:
            return active
        count = max(1, round(self.share * len(active)))
        return tuple(active[i] for i in sorted(torch.randperm(len(active))[:count].tolist()))

    def _values(self, front: Front, places: Sequence[int], cut: Cut, step: Step) -> tuple[Tensor, int]:
        """The mean loss at the head of some of a front's stages, (n,), and the span at which their gradients are there."""
        nodes, batches = [front.stages[i] for i in places], [front.batches[i] for i in places]
        outputs = front.evaluation.outputs.unbind(0)
        states = [outputs[i] for i in places]
        spines = [spine(n, cut.tree, self.kind) for n in nodes]
        trained = False
        for jump in range(max(map(len, spines))):
            moving = [i for i, jumps in enumerate(spines) if jump < len(jumps)]
            through = [spines[i][jump] for i in moving]
            for group in cut.last_blocks.partition(through, [states[i] for i in moving]):
                rows = [moving[p] for p in group]
                passed = tuple(through[p] for p in group)
                before = stack([states[i] for i in rows])
                name = cut.last_blocks.names[passed[0] - 1]
                with out_of_order(name, before[0]):
                    evaluation = cut.last_blocks(passed, before, [batches[i].context for i in rows])
                check_shape(name, evaluation.outputs[0], before[0])
                trained = trained or bool(evaluation.parameters)
                for i, state in zip(rows, evaluation.outputs.unbind(0), strict=True):
                    states[i] = state
        with out_of_order("the head", states[0]) if nodes[0] < cut.last else nullcontext():
            prediction = self._predict(nodes, states, batches, cut)
        labels = concatenate([batch.y for batch in batches])
        values, weights = sample_losses(self.loss, prediction, labels)
        means = row_means(wide(values), weights, len(nodes))
        step.report(nodes, error=means)
        if nodes[-1] == cut.last:
            step.label_loss = means[-1].detach()
        blocks, length = sum(map(len, spines)), max(map(len, spines))
        step.count(blocks, front.depth + length)
        step.count(blocks * (2 if trained else 1), front.depth + 2 * length)
        return means, front.depth + 2 * length

    def _predict(self, nodes: Sequence[int], states: Sequence[Tensor], batches: Sequence[Batch], cut: Cut) -> Any:
        """The heads' outputs, one stage's samples after the other's."""
        heads = [self._head(n, cut) for n in nodes]
        if len(set(heads)) == 1 and not any(batch.context for batch in batches):
            return heads[0](torch.cat(list(states)))
        return concatenate(
            [evaluate(head, state, batch.context) for head, state, batch in zip(heads, states, batches, strict=True)]
        )

    def _head(self, node: int, cut: Cut) -> nn.Module:
        return self.heads[node - 1] if self.heads and node < cut.last else cut.network.head

    def auxiliary(self, stage: int) -> list[nn.Module]:
        return [self.heads[stage - 1]] if stage <= len(self.heads) else []


def spine(node: int, tree: Tree, kind: Spine) -> tuple[int, ...]:
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


class Stream(Composed):
    """The chain's own states, pipelined over steps, and credit along a spine.

    Args:
        network: the network to train; blocks that spines pass keep the shape of the state.
        states: ``stream``: each stage works on what the one before it left in the last step, for stages on devices of their
            own; ``chain``: in order within the step, the way on one device, in the least memory.
        spine: the stages whose last blocks credit passes on its way to the head: 1, 3, 7, .. on (``doubling``); the
            ``right`` parents; the ``last`` one alone; ``none``.
        spine_share: share of the stages, drawn anew each step, that receive credit; theirs is scaled up to make up for it.
        heads: whether a spine ends at the network's head (``shared``) or, except the last stage's, at a fresh copy of the
            stage's ``own``.
        stage, rim, loss, engine: as of ``Composed``.

    Raises:
        ValueError: an option has no such value.
    """

    def __init__(
        self,
        network: Chain,
        *,
        stage: int | Sequence[int] = 1,
        states: Literal["stream", "chain"] = "stream",
        spine: Spine = "doubling",
        spine_share: float = 1.0,
        heads: Literal["shared", "own"] = "shared",
        rim: float = 0.0,
        loss: Loss = cross_entropy,
        engine: EngineChoice = "auto",
    ) -> None:
        check_choice("states", states, ("stream", "chain"))
        check_choice("spine", spine, ("doubling", "right", "last", "none"))
        check_choice("heads", heads, ("shared", "own"))
        check_number("spine_share", spine_share, above=0)
        if spine_share > 1:
            raise ValueError(f"spine_share is at most 1; got {spine_share}")
        stages = cut(network, stage)
        own = [fresh_copy(network.head) for _ in stages[:-1]] if heads == "own" else []
        super().__init__(
            network,
            StreamStates() if states == "stream" else ChainStates(),
            SpineCredit(loss, spine, spine_share, own),
            stage=stage,
            rim=rim,
            loss=loss,
            engine=engine,
        )


class Greedy(Stream):
    """Stages that learn by heads of their own, without a spine: the shortest sight, and the least work.

    Args:
        network: the network to train; blocks may change the shape of the state if copies of the head take it.
        spine, heads, options: as of ``Stream``.
    """

    def __init__(
        self,
        network: Chain,
        *,
        spine: Spine = "none",
        heads: Literal["shared", "own"] = "own",
        **options: Any,
    ) -> None:
        super().__init__(network, spine=spine, heads=heads, **options)
