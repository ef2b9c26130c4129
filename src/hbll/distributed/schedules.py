"""The schedules of ways to train a network on several devices, as lists of operations."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from hbll.distributed.simulate import Op, Schedule
from hbll.tree import Tree

__all__ = ["Meeting", "data_parallel", "one_f_one_b", "pipelined", "subtrees", "zbv"]


def one_f_one_b(stages: int, micros: int, steps: int = 1, flush: bool = True) -> Schedule:
    """A pipeline in which every stage, once it has begun to walk back, alternates forward and backward (1F1B).

    With fewer micro-batches than stages it is GPipe's, which torch's own refuses; with one the stages take turns.

    Args:
        flush: whether a step ends before the next begins (Fan et al., DAPPLE); if not, gradients are late by a step, and two
            versions of the weights are kept (Narayanan et al., arXiv 2006.09503: 2BW).
    """

    def order(stage: int, count: int) -> Iterator[tuple[str, int]]:
        ahead = min(stages - 1 - stage, count)
        yield from (("F", micro) for micro in range(ahead))
        for micro in range(ahead, count):
            yield "F", micro
            yield "B", micro - ahead
        yield from (("B", micro) for micro in range(count - ahead, count))

    def device(stage: int) -> Iterator[Op]:
        runs = [range(step, step + 1) for step in range(steps)] if flush else [range(steps)]
        for run in runs:
            for kind, number in order(stage, micros * len(run)):
                step, micro = divmod(number, micros)
                yield Op(kind, stage, micro, run[step])
                if kind == "B" and micro == micros - 1:
                    yield Op("U", stage, 0, run[step])

    return _flowing([tuple(device(stage)) for stage in range(stages)], stages, steps)


def zbv(devices: int, micros: int, steps: int = 1) -> Schedule:
    """A pipeline that goes down and up through the devices, each of which has two stages, and fills its gaps with the
    products for parameters (Qi et al., arXiv 2401.10241, section 6), in the order of torch's ``ScheduleZBVZeroBubble``."""

    def device(rank: int) -> Iterator[tuple[str, int]]:
        """Operations by the half of the way, 0 down and 1 up; the micro-batches of each kind follow one another."""
        count = max(2 * devices - 1, micros)
        done: Counter[tuple[str, int]] = Counter()

        def go(*letters: str) -> Iterator[tuple[str, int]]:
            for kind, half in letters:
                done[kind, int(half)] += 1
                yield kind, int(half)

        for _ in range(2 * (devices - rank) - 1):
            yield from go("F0")
        for _ in range(rank):
            yield from go("F1", "F0")
        for _ in range(devices - rank):
            yield from go("F1", "I1", "W1")
        while done["F", 1] < done["F", 0] or done["F", 0] < count:
            if done["F", 0] < count:
                yield from go("F0")
            yield from go("I0", "W0", "F1", "I1", "W1")
        for _ in range(rank):
            yield from go("I0", "I1")
        for _ in range(devices - rank):
            yield from go("I0", "W0")
        for half in (1, 0):
            while done["W", half] < done["I", half]:
                yield from go(f"W{half}")

    def ops(rank: int) -> Iterator[Op]:
        for step in range(steps):
            seen: Counter[tuple[str, int]] = Counter()
            for kind, half in device(rank):
                micro = seen[kind, half]
                seen[kind, half] += 1
                if micro < micros:  # the order is that of 2 p - 1 micro-batches, or more
                    yield Op(kind, 2 * devices - 1 - rank if half else rank, micro, step)
            yield from (Op("U", stage, 0, step) for stage in (rank, 2 * devices - 1 - rank))

    return _flowing([tuple(ops(rank)) for rank in range(devices)], 2 * devices, steps)


def _flowing(devices: Sequence[tuple[Op, ...]], stages: int, steps: int) -> Schedule:
    """Pipelines: each micro-batch needs the stage before it, and on its way back the one behind."""
    needs: dict[Op, tuple[Op, ...]] = {}
    for op in (op for ops in devices for op in ops):
        if op.kind == "F" and op.stage > 0:
            needs[op] = (op._replace(stage=op.stage - 1),)
        elif op.kind in "BI":
            behind = (op._replace(stage=op.stage + 1),) if op.stage < stages - 1 else ()
            needs[op] = (op._replace(kind="F"), *behind)
        elif op.kind == "W":
            needs[op] = (op._replace(kind="I"),)
    return Schedule(tuple(devices), needs, steps)


class Meeting(NamedTuple):
    """A module whose copies, in readouts of earlier stages, are refreshed. Stages count from 0."""

    owner: int
    """The stage that has the original."""
    copies: tuple[int, ...]
    mean: bool = True
    """Whether all become the mean of all, which the owner makes; else the original is sent to the copies."""


def pipelined(stages: int, steps: int = 1, refresh: int | None = None, meetings: Sequence[Meeting] = ()) -> Schedule:
    """Stages that learn from their own losses (``stream``, ``greedy``): the output goes on as soon as it is there, then come
    the readout and the way back, ``B``, to which nobody listens.

    Args:
        refresh: after how many steps there are meetings; None for never. With them a step is one of the stages' common
            clock, in which a stage works on what the one before it left in the last; in the first all have something.
        meetings: in their order. Of the m-th, as of a micro-batch m, ``C`` sends a copy, ``M`` makes what all agree on, and
            ``G`` takes it.
    """
    devices: list[list[Op]] = [[] for _ in range(stages)]
    needs: dict[Op, tuple[Op, ...]] = {}
    for step in range(steps):
        given_at = step - 1 if refresh else step
        for stage, ops in enumerate(devices):
            forward, backward = Op("F", stage, 0, step), Op("B", stage, 0, step)
            ops += [forward, backward, Op("U", stage, 0, step)]
            needs[backward] = (forward,)
            if stage > 0 and given_at >= 0:
                needs[forward] = (Op("F", stage - 1, 0, given_at),)
        if refresh and (step + 1) % refresh == 0:
            for number, (owner, copies, mean) in enumerate(meetings):
                sent = [Op("C", copy, number, step) for copy in copies] if mean else []
                agreed = Op("M", owner, number, step)
                taken = [Op("G", copy, number, step) for copy in copies]
                needs |= {agreed: tuple(sent), **dict.fromkeys(taken, (agreed,))}
                for op in (*sent, agreed, *taken):
                    devices[op.stage].append(op)
    return Schedule(tuple(map(tuple, devices)), needs, steps)


def data_parallel(parts: int, steps: int = 1) -> Schedule:
    """A replica, and what lies between all of them as a second device, whose operations ``R`` reduce the gradients of a part
    of the network while the replica walks back through those before it. Replicas are alike: one stands for all."""
    replica: list[Op] = []
    between: list[Op] = []
    needs: dict[Op, tuple[Op, ...]] = {}
    for step in range(steps):
        forward = [Op("F", part, 0, step) for part in range(parts)]
        backward = [Op("B", part, 0, step) for part in reversed(range(parts))]
        reduced = [op._replace(kind="R") for op in backward]
        update = Op("U", 0, 0, step)
        replica += [*forward, *backward, update]
        between += reduced
        needs.update({after: (before,) for before, after in pairwise([*forward, *backward])})
        needs.update({after: (before,) for before, after in zip(backward, reduced, strict=True)})
        needs[update] = tuple(reduced)
    return Schedule((tuple(replica), tuple(between)), needs, steps)


def subtrees(owners: Sequence[int], posterior: bool, steps: int = 1) -> Schedule:
    """The tree of ``paper`` and ``tree`` over devices that each own consecutive blocks.

    Of a node n, which is stage n - 1, with the right neighbour j: ``F`` is its prior; ``E`` the evaluation of block j on it
    with both products, by j's owner, or the head by the last; ``T`` the target, made of the gradient that comes back; ``W``
    the walk back through block n, with the product for the input where that is the network's. ``Z``, of stage 0, is the
    embedded input.

    Args:
        owners: the device of every block, from 0.
        posterior: whether children read the target of a node (``paper``), or its prior (``tree``).
    """
    tree = Tree(len(owners) + 1)
    devices: list[list[Op]] = [[] for _ in range(max(owners) + 1)]
    owner = [0, *owners, len(devices) - 1]  # of the embedded input, the blocks, the head
    needs: dict[Op, tuple[Op, ...]] = {}
    for step in range(steps):

        def op(kind: str, node: int, step: int = step) -> Op:
            return Op(kind, node - 1, 0, step)

        embedded = Op("Z", 0, 0, step)
        devices[0].append(embedded)
        for level in tree.levels:
            for n in level:
                left = tree.left(n)
                needs[op("F", n)] = (op("T" if posterior else "F", left) if left else embedded,)
                needs[op("E", n)] = (op("F", n),)
                needs[op("T", n)] = (op("F", n), op("E", n))
                needs[op("W", n)] = (op("T", n),)
            for kind in "FETW":
                for n in level:
                    devices[owner[tree.right(n) if kind == "E" else n]].append(op(kind, n))
        for device, ops in enumerate(devices):
            ops.append(Op("U", device, 0, step))
        # The gradients of the embedded input gather at the embed's owner.
        first = Op("U", 0, 0, step)
        needs[first] = tuple(op("W", n) for n in tree.chain if tree.left(n) == 0)
    return Schedule(tuple(map(tuple, devices)), needs, steps)
