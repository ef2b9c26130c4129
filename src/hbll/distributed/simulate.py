"""Schedules as data, and when each of their operations would run: a discrete-event simulation.

A schedule is a list of operations for every device, which runs them in that order, each as soon as the results that it needs
are there. Results cross from device to device as messages that nobody waits for, but for a bound on those under way.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import NamedTuple, TypeAlias

__all__ = ["Network", "Op", "Schedule", "Timeline", "longest_chain", "messages", "peak", "period", "simulate"]


class Op(NamedTuple):
    """An operation of a device."""

    kind: str
    """``F`` forward; ``B`` backward, of which ``I`` is the product for the input and ``W`` that for the parameters; ``U``
    update; others as a schedule says."""
    stage: int
    """From 0."""
    micro: int = 0
    """The micro-batch of the step, from 0."""
    step: int = 0


@dataclass(frozen=True)
class Schedule:
    """Some training steps of a scheme."""

    devices: tuple[tuple[Op, ...], ...]
    """What each device runs, in order."""
    needs: Mapping[Op, tuple[Op, ...]]
    """Operations whose results an operation needs, those of other devices among them; none where it is not named."""
    steps: int = 1

    @cached_property
    def owner(self) -> dict[Op, int]:
        """The device of every operation."""
        return {op: device for device, ops in enumerate(self.devices) for op in ops}


@dataclass(frozen=True)
class Network:
    """What connects devices: each sends its messages one after the other, and takes any number at once."""

    bandwidth: float = inf
    """Bytes that a device sends in a second."""
    delay: float = 0.0
    """Seconds from the end of sending to arrival."""
    in_flight: int | None = None
    """Messages of a kind from one device to another that may wait to be taken; a sender that has reached it goes on when it
    hears, a delay later, that one was. None: any."""
    asked: bool = False
    """Whether a device asks for a message only when it gets to the operation that needs it, so that it leaves no sooner than
    the sender hears of that, as it is with torch's pipelines; else room for it has been made before."""


class Span(NamedTuple):
    """Seconds from the beginning of the first step."""

    start: float
    end: float


Timeline: TypeAlias = Mapping[Op, Span]
"""When every operation runs."""


def messages(schedule: Schedule) -> dict[Op, tuple[int, ...]]:
    """The other devices that each result goes to, once each; operations without any are left out."""
    owner = schedule.owner
    receivers: dict[Op, dict[int, None]] = defaultdict(dict)
    for ops in schedule.devices:
        for op in ops:
            for need in schedule.needs.get(op, ()):
                if owner[need] != owner[op]:
                    receivers[need][owner[op]] = None
    return {op: tuple(devices) for op, devices in receivers.items()}


def simulate(
    schedule: Schedule,
    seconds: Callable[[Op], float],
    size: Callable[[Op], float] = lambda op: 0.0,
    network: Network = Network(),
) -> Timeline:
    """When every operation runs.

    Args:
        seconds: how long an operation takes its device.
        size: bytes of its result, where other devices need it.
        network: what messages cross.

    Raises:
        ValueError: the schedule never ends, because operations wait for each other.
    """
    owner, receivers = schedule.owner, messages(schedule)
    times: dict[Op, Span] = {}
    arrived: dict[tuple[Op, int], float] = {}
    taken: dict[tuple[Op, int], float] = {}
    """When a message was, by the device it went to."""
    sent: dict[tuple[int, int, str], list[Op]] = defaultdict(list)
    free, port, position = ([0.0] * len(schedule.devices), [0.0] * len(schedule.devices), [0] * len(schedule.devices))
    waiting: dict[Op | tuple[Op, int], list[int]] = defaultdict(list)

    def holds_up(device: int, op: Op) -> Op | tuple[Op, int] | None:
        """What has to happen before the fate of the device's next operation is known: an end, or the taking of a message."""
        for need in schedule.needs.get(op, ()):
            if need not in times:
                return need
        for receiver in receivers.get(op, ()):
            full = blocking(device, receiver, op.kind)
            if full and full not in taken:
                return full
        return None

    def blocking(device: int, receiver: int, kind: str) -> tuple[Op, int] | None:
        """The message that has to be taken before another may be sent."""
        before = sent[device, receiver, kind]
        if network.in_flight is None or len(before) < network.in_flight:
            return None
        return before[len(before) - network.in_flight], receiver

    def arrival(op: Op, receiver: int) -> float:
        """When a message is there that its receiver has got to."""
        if network.asked and (op, receiver) not in taken:
            heard = free[receiver] + network.delay
            return max(arrived[op, receiver], heard + size(op) / network.bandwidth + network.delay)
        return arrived[op, receiver]

    def run(device: int, op: Op) -> list[Op | tuple[Op, int]]:
        """What has happened by it."""
        needs = schedule.needs.get(op, ())
        start = max([free[device], *(arrival(n, device) if owner[n] != device else times[n].end for n in needs)])
        first = [(n, device) for n in needs if owner[n] != device and (n, device) not in taken]
        taken.update(dict.fromkeys(first, start))
        end = free[device] = start + seconds(op)
        times[op] = Span(start, end)
        for receiver in receivers.get(op, ()):
            full = blocking(device, receiver, op.kind)
            free[device] = max(free[device], taken[full] + network.delay) if full else free[device]
            port[device] = max(free[device], port[device]) + size(op) / network.bandwidth
            arrived[op, receiver] = port[device] + network.delay
            sent[device, receiver, op.kind].append(op)
        return [op, *first]

    ready = deque(range(len(schedule.devices)))
    while ready:
        device = ready.popleft()
        ops = schedule.devices[device]
        while position[device] < len(ops):
            op = ops[position[device]]
            event = holds_up(device, op)
            if event is not None:
                waiting[event].append(device)
                break
            position[device] += 1
            for event in run(device, op):
                ready.extend(waiting.pop(event, ()))
    for device, ops in enumerate(schedule.devices):
        if position[device] < len(ops):
            raise ValueError(f"the schedule never ends: device {device} waits for ever before {ops[position[device]]}")
    return times


def period(timeline: Timeline, steps: int) -> float:
    """Seconds a step once the pipeline is full: from the end of one step to that of another in the middle.

    The last step is left out, in which a pipeline may be running empty.
    """
    ends = [0.0] * steps
    for op, span in timeline.items():
        ends[op.step] = max(ends[op.step], span.end)
    first, last = max(steps - 2, 0) // 2, max(steps - 2, 0)
    return (ends[last] - ends[first]) / (last - first) if last > first else ends[0]


def longest_chain(schedule: Schedule, seconds: Callable[[Op], float], across: bool = True) -> float:
    """Seconds of the longest chain of operations of one step in which each needs the result of the one before.

    Args:
        seconds: what an operation adds to the chain.
        across: whether a chain goes on from device to device; where it does not, what another device sends was there before
            the step began.
    """
    owner = schedule.owner
    reached: dict[Op, float] = {}
    pending = [(op, False) for ops in schedule.devices for op in ops if op.step == 0]
    while pending:
        op, looked_at = pending.pop()
        if op in reached:
            continue
        needs = [n for n in schedule.needs.get(op, ()) if across or owner[n] == owner[op]]
        if looked_at:
            reached[op] = seconds(op) + max((reached[n] for n in needs), default=0.0)
        else:
            pending += [(op, True), *((n, False) for n in needs)]
    return max(reached.values())


def peak(ops: Sequence[Op], held: Callable[[Op], tuple[float, float]]) -> float:
    """Most bytes that a device holds while it runs operations in order.

    Args:
        held: of an operation the bytes that it holds while it runs, and those that are more, or fewer, afterwards.
    """
    most = now = 0.0
    for op in ops:
        during, after = held(op)
        most = max(most, now + during, now + after)
        now += after
    return most
