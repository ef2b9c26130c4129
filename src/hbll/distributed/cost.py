"""What a training step costs by each way to spread a network over devices: seconds, work, span, messages, bytes, memory.

The seconds are those of the simulated schedules. Optimizers, heads and embeds are in them; the copies of what torch keeps
beside the tensors, and whatever else runs on a machine, are not.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import accumulate, pairwise
from typing import Literal, TypeAlias

from hbll.distributed import schedules
from hbll.distributed.simulate import (
    Network,
    Op,
    Schedule,
    Timeline,
    longest_chain,
    messages,
    peak,
    period,
    simulate,
)
from hbll.rules.readouts import spine
from hbll.tree import Tree

__all__ = [
    "SCHEMES",
    "Costs",
    "Estimate",
    "Line",
    "Part",
    "Priced",
    "ReadoutKind",
    "balanced",
    "by_backpropagation",
    "by_data",
    "by_late_pipeline",
    "by_local_stages",
    "by_pipeline",
    "by_tree",
    "by_zero_bubble",
    "equal",
    "estimate",
    "sent",
    "step_seconds",
]

ReadoutKind: TypeAlias = Literal["spine", "last", "head", "solo"]
"""As of ``hbll.rules.Stream``: copies of the last blocks 1, 3, 7, .. stages on (``spine="doubling"``), or of the last one
alone; a head alone; two blocks of its own."""

SCHEMES: Mapping[ReadoutKind, str] = {
    "spine": "stream",
    "last": "stream, one jump",
    "head": "greedy",
    "solo": "solo",
}
"""What the rules of these readouts are called."""

STEPS = 3
"""Steps that are simulated: the time between the ends of the first and the second counts."""

LOCAL_STEPS = 8
"""The same where steps overlap over many devices: those in the middle count."""

BUCKETS = (2**20, 25 * 2**20)
"""Bytes of gradients that DistributedDataParallel reduces at once: those that come first, and all others."""


@dataclass(frozen=True)
class Line:
    """Seconds of a call: a part of its own, and one that grows with the samples."""

    fixed: float = 0.0
    each: float = 0.0

    def at(self, samples: float) -> float:
        """Seconds of a call on so many samples."""
        return self.fixed + self.each * samples


@dataclass(frozen=True)
class Part:
    """What the embed, a block or the head costs; the head with the label's loss."""

    forward: Line
    backward: Line
    """Both products."""
    inputs: Line
    """The product for the input, a part of ``backward``."""
    parameters: float = 0.0
    """Bytes."""
    graph: float = 0.0
    """Bytes a sample that are kept for the walk back."""
    state: float = 0.0
    """Bytes a sample of the result."""


@dataclass(frozen=True)
class Costs:
    """What the parts of a network cost on one device."""

    embed: Part
    blocks: tuple[Part, ...]
    head: Part
    labels: float = 0.0
    """Bytes a sample of the labels."""
    update: float = 0.0
    """Seconds of the optimizer for a byte of parameters."""
    kept: float = 2.0
    """Bytes that the optimizer keeps for a byte of parameters: AdamW two."""

    @cached_property
    def front(self) -> tuple[Part, ...]:
        """What lies before the first block; an embed without parameters is not walked back, and counts as nothing."""
        return (self.embed,) if self.embed.parameters else ()

    @property
    def whole(self) -> tuple[Part, ...]:
        """All parts in order."""
        return (*self.front, *self.blocks, self.head)

    def stages(self, sizes: Sequence[int]) -> list[tuple[Part, ...]]:
        """The parts of stages of so many blocks, the embed with the first and the head with the last."""
        ends = [0, *accumulate(sizes)]
        stages = [self.blocks[a:b] for a, b in pairwise(ends)]
        stages[0] = (*self.front, *stages[0])
        stages[-1] = (*stages[-1], self.head)
        return stages

    def repeated(self, blocks: int) -> "Costs":
        """Of a network of so many blocks, these over and over."""
        times = -(-blocks // len(self.blocks))
        return replace(self, blocks=(self.blocks * times)[:blocks])


def equal(blocks: int) -> Costs:
    """Costs in block evaluations of a batch of one sample: forward and both products one each, embed and head nothing."""
    unit, none = Line(0.0, 1.0), Line()
    block = Part(unit, Line(0.0, 2.0), unit, state=1.0)
    # An embed of hardly any parameters: backpropagation's first block is walked back through for it.
    embed = Part(none, none, none, parameters=1e-9, state=1.0)
    return Costs(embed, (block,) * blocks, Part(none, none, none))


@dataclass(frozen=True)
class Priced:
    """A schedule with the prices of its operations."""

    scheme: str
    schedule: Schedule
    seconds: Callable[[Op], float]
    size: Callable[[Op], float]
    """Bytes of a result, where another device needs it."""
    chain: Callable[[Op], float]
    """Seconds that an operation adds to a chain of dependent ones: without the products for parameters."""
    held: Callable[[Op], tuple[float, float]]
    resident: Sequence[float]
    """Bytes of weights, gradients, what the optimizer keeps and buffers, of every device."""
    sizes: tuple[int, ...]
    """Blocks of every stage."""
    micros: int = 1
    across: bool = True
    """Whether a step's chain goes from device to device."""
    replicas: int = 1
    in_flight: int | None = None
    """States that may be under way from one device to the next, or wait there."""
    asked: bool = False
    """Whether messages are asked for no sooner than they are needed."""
    every: int = 1
    """Steps after which all is as it was: those from one refresh of copies to the next."""
    reduced: tuple[int, float] | None = None
    """Messages of all devices, and bytes that each sends, where the schedule is that of one replica among others: its
    operations ``R`` are priced as messages, and what it shows crosses no network."""


@dataclass(frozen=True)
class Estimate:
    """What a step costs."""

    scheme: str
    micros: int
    """Micro-batches."""
    sizes: tuple[int, ...]
    """Blocks of every stage."""
    seconds: float
    """Of a step among many."""
    alone: float
    """Of a step by itself, from its first operation to its last; where copies are refreshed, of the stages' common clock."""
    busy: float
    """Of these the busiest device computes."""
    work: float
    """Seconds that all devices compute together, without optimizers."""
    span: float
    """Seconds of the longest chain of dependent evaluations in a step, on devices without number."""
    messages: float
    """Of all devices."""
    bytes: float
    """Most that a device sends."""
    memory: float
    """Bytes that the fullest device holds."""


def step_seconds(priced: Priced, network: Network) -> float:
    """Seconds of a step among many."""
    return period(_timeline(priced, network), priced.schedule.steps)


def _timeline(priced: Priced, network: Network) -> Timeline:
    crossed = Network() if priced.reduced else replace(network, in_flight=priced.in_flight, asked=priced.asked)
    return simulate(priced.schedule, priced.seconds, priced.size, crossed)


def estimate(priced: Priced, network: Network) -> Estimate:
    """Simulates a scheme."""
    schedule = priced.schedule
    timeline = _timeline(priced, network)
    first = [[op for op in ops if op.step == 0] for ops in schedule.devices]
    busy = [sum(map(priced.seconds, ops)) for ops in first]
    computed = [op for ops in first for op in ops if op.kind not in "UR"]
    counts, sizes = zip(*sent(priced), strict=True)
    count, most = priced.reduced or (sum(counts), max(sizes))
    begun = min(timeline[op].start for ops in first for op in ops)
    return Estimate(
        scheme=priced.scheme,
        micros=priced.micros,
        sizes=priced.sizes,
        seconds=period(timeline, schedule.steps),
        alone=max(timeline[op].end for ops in first for op in ops) - begun,
        busy=max(busy[: len(priced.resident)]),
        work=priced.replicas * sum(map(priced.seconds, computed)),
        span=longest_chain(schedule, priced.chain, priced.across),
        messages=count,
        bytes=most,
        memory=max(bytes_ + peak(ops, priced.held) for bytes_, ops in zip(priced.resident, first, strict=False)),
    )


def sent(priced: Priced) -> list[tuple[float, float]]:
    """Messages and bytes that every device sends in a step, the mean over those from one refresh to the next."""
    owner, found = priced.schedule.owner, [(0.0, 0.0)] * len(priced.schedule.devices)
    for op, to in messages(priced.schedule).items():
        if op.step < priced.every:
            count, size = found[owner[op]]
            found[owner[op]] = count + len(to) / priced.every, size + len(to) * priced.size(op) / priced.every
    return found


def by_backpropagation(costs: Costs, batch: int) -> Priced:
    """On one device."""
    return replace(by_pipeline(costs, batch, 1, 1), scheme="bp")


def by_pipeline(costs: Costs, batch: int, devices: int, micros: int) -> Priced:
    """1F1B; with fewer micro-batches than devices GPipe, with one the stages take turns.

    Raises:
        ValueError: there are fewer blocks than devices or fewer samples than micro-batches.
    """
    sizes = balanced(costs, devices, _split(batch, micros))
    schedule = schedules.one_f_one_b(devices, micros, STEPS)
    return _pipeline("1F1B" if micros >= devices else "GPipe", costs, batch, sizes, micros, schedule)


def by_late_pipeline(costs: Costs, batch: int, devices: int, micros: int) -> Priced:
    """2BW: 1F1B that is never emptied; gradients are late by one step, and a second version of the weights is kept.

    Raises:
        ValueError: as ``by_pipeline``; or there are fewer micro-batches than devices.
    """
    if micros < devices:
        raise ValueError(f"2BW needs as many micro-batches as devices, {devices}; got {micros}")
    sizes = balanced(costs, devices, _split(batch, micros))
    schedule = schedules.one_f_one_b(devices, micros, STEPS, flush=False)
    priced = _pipeline("2BW", costs, batch, sizes, micros, schedule)
    versions = [sum(part.parameters for part in parts) for parts in costs.stages(sizes)]
    return replace(priced, resident=[a + b for a, b in zip(priced.resident, versions, strict=True)])


def by_zero_bubble(costs: Costs, batch: int, devices: int, micros: int) -> Priced:
    """ZBV, two stages a device.

    Raises:
        ValueError: as ``by_late_pipeline``, of two stages a device.
    """
    if micros < devices:
        raise ValueError(f"ZBV needs as many micro-batches as devices, {devices}; got {micros}")
    sizes = balanced(costs, 2 * devices, _split(batch, micros))
    priced = _pipeline("ZBV", costs, batch, sizes, micros, schedules.zbv(devices, micros, STEPS))
    folded = [a + b for a, b in zip(priced.resident[:devices], reversed(priced.resident[devices:]), strict=True)]
    return replace(priced, resident=folded)


def _split(batch: int, micros: int) -> float:
    """Samples of a micro-batch."""
    if micros > batch:
        raise ValueError(f"a batch of {batch} cannot be split into {micros}")
    return batch / micros


def _pipeline(scheme: str, costs: Costs, batch: int, sizes: tuple[int, ...], micros: int, schedule: Schedule) -> Priced:
    stages, samples = costs.stages(sizes), batch / micros
    forward, backward, inputs = (
        [sum(getattr(part, what).at(samples) for part in parts) for parts in stages]
        for what in ("forward", "backward", "inputs")
    )
    states = [_output(parts) * samples for parts in stages]
    graphs = [_graph(parts) * samples for parts in stages]
    updates = [costs.update * _parameters(parts) for parts in stages]

    def seconds(op: Op) -> float:
        match op.kind:
            case "F":
                return forward[op.stage]
            case "B":
                return backward[op.stage]
            case "I":
                return inputs[op.stage]
            case "W":
                return backward[op.stage] - inputs[op.stage]
        return updates[op.stage]

    def chain(op: Op) -> float:
        return {"F": forward, "B": inputs, "I": inputs}[op.kind][op.stage] if op.kind in "FBI" else 0.0

    def held(op: Op) -> tuple[float, float]:
        return 0.0, graphs[op.stage] * {"F": 1, "B": -1, "W": -1}.get(op.kind, 0)

    return Priced(
        scheme,
        schedule,
        seconds,
        lambda op: states[op.stage] if op.kind == "F" else states[op.stage - 1],
        chain,
        held,
        [_resident(costs, parts) for parts in stages],
        sizes,
        micros,
    )


def by_local_stages(
    costs: Costs,
    batch: int,
    devices: int,
    readout: ReadoutKind = "spine",
    wire: float = 1.0,
    in_flight: int = 2,
    refresh: int | None = None,
    sizes: tuple[int, ...] | None = None,
) -> Priced:
    """Stages that learn by readouts of their own: ``stream``, ``greedy`` or ``solo``.

    Args:
        readout: the readouts.
        wire: bytes of a state on the wire, of its own: a half in bfloat16.
        in_flight: buffers at either end of a link, as of ``Worker``.
        refresh: steps after which copies and originals meet, and become the mean of both; solo's take the head, all of which
            is counted. None for never.
        sizes: blocks of every stage; as ``balanced`` has them unless given.

    Raises:
        ValueError: there are fewer blocks than devices, or states change shape and readouts have blocks.
    """
    if readout != "head":
        _check_one_shape(costs)
    sizes = sizes or balanced(costs, devices, batch, readout)
    ends = dict(enumerate(accumulate(sizes), 1))
    copies = [(*_passed(costs, readout, s, devices, ends), costs.head) for s in range(1, devices)] + [()]
    stages = costs.stages(sizes)
    inner = [sum(part.forward.at(batch) for part in parts) for parts in stages]
    back = [_local_backward(*pair, batch, s) for s, pair in enumerate(zip(stages, copies, strict=True))]
    both = [(*parts, *copy) for parts, copy in zip(stages, copies, strict=True)]
    graphs = [batch * _graph(parts) for parts in both]
    updates = [costs.update * _parameters(parts) for parts in both]
    crossing = [batch * (wire * _output(parts) + costs.labels) for parts in stages[:-1]]
    meetings = _meetings(costs, readout, devices, ends) if refresh else []
    buffers = [in_flight * (before + after) for before, after in zip([0.0, *crossing], [*crossing, 0.0], strict=True)]

    def seconds(op: Op) -> float:
        return {"F": inner, "B": back, "U": updates}[op.kind][op.stage] if op.kind in "FBU" else 0.0

    def chain(op: Op) -> float:
        if op.kind == "B":
            walked = sum(part.inputs.at(batch) for part in both[op.stage])
            return walked + sum(part.forward.at(batch) for part in copies[op.stage])
        return inner[op.stage] if op.kind == "F" else 0.0

    def held(op: Op) -> tuple[float, float]:
        return 0.0, graphs[op.stage] * {"F": 1, "B": -1}.get(op.kind, 0)

    return Priced(
        SCHEMES[readout],
        # Time is taken from the end of one meeting to that of the next.
        schedules.pipelined(devices, 2 * refresh + 1 if refresh else LOCAL_STEPS, refresh, [m for m, _ in meetings]),
        seconds,
        lambda op: crossing[op.stage] if op.kind == "F" else meetings[op.micro][1],
        chain,
        held,
        [_resident(costs, parts) + room for parts, room in zip(both, buffers, strict=True)],
        sizes,
        across=False,
        in_flight=2 * in_flight,
        every=refresh or 1,
    )


def _passed(costs: Costs, readout: ReadoutKind, stage: int, stages: int, ends: Mapping[int, int]) -> Sequence[Part]:
    """The blocks of the readout of a stage, from 1 on; the last has none.

    Args:
        ends: how many blocks there are up to the end of each later stage.
    """
    if readout == "solo":
        return costs.blocks[:2] if stage < stages else ()
    return [costs.blocks[ends[later] - 1] for later in _jumps(readout, stage, stages)]


def _jumps(readout: ReadoutKind, stage: int, stages: int) -> tuple[int, ...]:
    """The stages whose last blocks a readout has copies of."""
    if readout in ("head", "solo") or stage == stages:
        return ()
    return (stages,) if readout == "last" else _spines(stages)[stage - 1]


def _meetings(
    costs: Costs, readout: ReadoutKind, stages: int, ends: Mapping[int, int]
) -> list[tuple[schedules.Meeting, float]]:
    """What is refreshed, in the order of the network, with its bytes."""
    copies: dict[int, list[int]] = defaultdict(list)
    for stage in range(1, stages):
        for later in _jumps(readout, stage, stages):
            copies[later].append(stage - 1)
    found = [
        (schedules.Meeting(later - 1, tuple(copies[later])), costs.blocks[ends[later] - 1].parameters)
        for later in sorted(copies)
    ]
    head = schedules.Meeting(stages - 1, tuple(range(stages - 1)), mean=readout != "solo")
    return [*found, (head, costs.head.parameters)]


@cache
def _spines(stages: int) -> list[tuple[int, ...]]:
    """The stages that the spine of every stage passes."""
    tree = Tree(stages + 1)
    return [spine(stage, tree, "doubling") for stage in range(1, stages + 1)]


def _local_backward(parts: Sequence[Part], readout: Sequence[Part], batch: float, stage: int) -> float:
    """Seconds of the readout and of the walk back, which ends at the stage's input, if that is not the embed's."""
    read = sum(part.forward.at(batch) + part.backward.at(batch) for part in readout)
    walked = sum(part.backward.at(batch) for part in parts)
    return read + walked - (parts[0].inputs.at(batch) if stage else 0.0)


def by_data(costs: Costs, batch: int, devices: int, network: Network) -> Priced:
    """Data parallel, as DistributedDataParallel does it: gradients are reduced in buckets, around a ring, while those of the
    blocks before them are computed.

    Raises:
        ValueError: there are fewer samples than devices.
    """
    if devices > batch:
        raise ValueError(f"a batch of {batch} cannot be split over {devices} devices")
    samples = batch / devices
    parts = _buckets(costs.whole)
    schedule = schedules.data_parallel(len(parts), STEPS)
    reduced = [_parameters(part) for part in parts]
    rounds = 2 * (devices - 1)

    def seconds(op: Op) -> float:
        match op.kind:
            case "F":
                return sum(part.forward.at(samples) for part in parts[op.stage])
            case "B":
                return sum(part.backward.at(samples) for part in parts[op.stage])
            case "R":
                return rounds * (network.delay + reduced[op.stage] / devices / network.bandwidth)
        return costs.update * sum(reduced)

    def chain(op: Op) -> float:
        if op.kind == "B":
            return sum(part.inputs.at(samples) for part in parts[op.stage])
        return seconds(op) if op.kind == "F" else 0.0

    def held(op: Op) -> tuple[float, float]:
        return 0.0, _graph(parts[op.stage]) * samples * {"F": 1, "B": -1}.get(op.kind, 0)

    return Priced(
        "DDP",
        schedule,
        seconds,
        lambda op: 0.0,
        chain,
        held,
        [_resident(costs, costs.whole)],
        (len(costs.blocks),),
        replicas=devices,
        reduced=(rounds * devices * len(parts), rounds / devices * sum(reduced)),
    )


def _buckets(parts: Sequence[Part]) -> list[tuple[Part, ...]]:
    """Parts whose gradients are reduced together, in the order of the network; the last ones come first."""
    found: list[list[Part]] = [[]]
    for part in reversed(parts):
        limit = BUCKETS[min(len(found) - 1, 1)]
        if found[-1] and _parameters(found[-1]) + part.parameters > limit:
            found.append([])
        found[-1].insert(0, part)
    return [tuple(bucket) for bucket in reversed(found)]


def by_tree(costs: Costs, batch: int, devices: int, posterior: bool) -> Priced:
    """``paper`` (posterior boundaries) or ``tree`` over devices that own consecutive blocks.

    Raises:
        ValueError: there are fewer blocks than devices, or states change shape.
    """
    _check_one_shape(costs)
    sizes = balanced(costs, devices, batch)
    owners = [device for device, size in enumerate(sizes) for _ in range(size)]
    tree = Tree(len(owners) + 1)
    blocks, head = costs.blocks, costs.head
    stages = costs.stages(sizes)
    state = batch * blocks[0].state

    def neighbour(op: Op) -> Part:
        right = tree.right(op.stage + 1)
        return head if right == tree.nodes else blocks[right - 1]

    def seconds(op: Op) -> float:
        match op.kind:
            case "Z":
                return costs.embed.forward.at(batch)
            case "F":
                return blocks[op.stage].forward.at(batch)
            case "E":
                return neighbour(op).forward.at(batch) + neighbour(op).backward.at(batch)
            case "W":
                block = blocks[op.stage]
                inputs = 0.0 if costs.front and tree.left(op.stage + 1) == 0 else block.inputs.at(batch)
                return block.backward.at(batch) - inputs
            case "U":
                embed = costs.embed.backward.at(batch) if op.stage == 0 else 0.0
                return embed + costs.update * _parameters(stages[op.stage])
        return 0.0

    def chain(op: Op) -> float:
        match op.kind:
            case "F":
                return seconds(op)
            case "E":
                return neighbour(op).forward.at(batch) + neighbour(op).inputs.at(batch)
            case "W":
                return blocks[op.stage].inputs.at(batch)
        return 0.0

    def held(op: Op) -> tuple[float, float]:
        match op.kind:
            case "F":
                return 0.0, batch * blocks[op.stage].graph + state
            case "E":
                return batch * neighbour(op).graph + state, 0.0
            case "T":
                return 0.0, state
            case "W":
                return 0.0, -batch * blocks[op.stage].graph
            case "U":  # the states of the step
                return 0.0, -2 * sizes[op.stage] * state
        return 0.0, 0.0

    return Priced(
        "paper" if posterior else "tree",
        schedules.subtrees(owners, posterior, STEPS),
        seconds,
        lambda op: state,
        chain,
        held,
        [_resident(costs, parts) for parts in stages],
        sizes,
    )


def balanced(costs: Costs, stages: int, samples: float, readout: ReadoutKind | None = None) -> tuple[int, ...]:
    """The sizes of so many stages, the slowest of which is as fast as can be.

    Args:
        samples: of a call.
        readout: of stages that learn by readouts of their own, whose time is counted in.

    Raises:
        ValueError: there are fewer blocks than stages.
    """
    count = len(costs.blocks)
    if stages > count:
        raise ValueError(f"{count} blocks cannot be cut into {stages} stages")

    @cache
    def of(part: Part) -> float:
        return part.forward.at(samples) + part.backward.at(samples) + costs.update * part.parameters

    sums = [0.0, *accumulate(map(of, costs.blocks))]
    front, head = sum(map(of, costs.front)), of(costs.head)

    def cut(limit: float) -> tuple[int, ...] | None:
        """Stages none of which is slower, the later ones as large as can be; None if there are none."""
        sizes, ends, end = [], {}, count
        for stage in range(stages, 0, -1):
            ends[stage] = end
            beside = front if stage == 1 else 0.0
            beside += head if stage == stages or readout else 0.0
            beside += sum(map(of, _passed(costs, readout, stage, stages, ends))) if readout else 0.0

            def seconds(first: int, end: int = end, beside: float = beside, stage: int = stage) -> float:
                unwalked = costs.blocks[first].inputs.at(samples) if readout and stage > 1 else 0.0
                return sums[end] - sums[first] + beside - unwalked

            first = 0 if stage == 1 else end - 1
            while first > stage - 1 and seconds(first - 1) <= limit:
                first -= 1
            if seconds(first) > limit:
                return None
            sizes.append(end - first)
            end = first
        return tuple(reversed(sizes))

    low, high = 0.0, max(map(of, costs.blocks)) + front + head
    while (best := cut(high)) is None:
        low, high = high, 2 * high
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        found = cut(middle)
        low, high, best = (middle, high, best) if found is None else (low, middle, found)
    return best


def _check_one_shape(costs: Costs) -> None:
    if len({part.state for part in (costs.embed, *costs.blocks)}) > 1:
        raise ValueError("states change shape, and blocks are called out of order")


def _parameters(parts: Sequence[Part]) -> float:
    return sum(part.parameters for part in parts)


def _graph(parts: Sequence[Part]) -> float:
    return sum(part.graph for part in parts)


def _output(parts: Sequence[Part]) -> float:
    return parts[-1].state


def _resident(costs: Costs, parts: Sequence[Part]) -> float:
    """Bytes of weights, their gradients and what the optimizer keeps."""
    return (2 + costs.kept) * _parameters(parts)
