"""Which way to spread a network over devices is the fastest, which fits, and why."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hbll.distributed.cost import (
    SCHEMES,
    Costs,
    Estimate,
    Priced,
    ReadoutKind,
    by_backpropagation,
    by_data,
    by_late_pipeline,
    by_local_stages,
    by_pipeline,
    by_tree,
    by_zero_bubble,
    estimate,
    step_seconds,
)
from hbll.distributed.simulate import Network

__all__ = ["COLUMNS", "Choice", "Plan", "as_json", "growth", "make_plan", "reasons", "table"]

MOST_OPERATIONS = 2**17
"""That are simulated: of a pipeline's step, so that more micro-batches are not tried, or of stages from one refresh of
copies to the one after the next."""

Build = Callable[[Costs, int, int, int, Network], Priced]
"""Of costs, batch, devices, micro-batches and what connects the devices."""


def whole(refresh: int | None) -> dict[str, Build]:
    """Schemes that do not split a batch any further.

    Args:
        refresh: steps after which copies meet their originals; None for what rules do by themselves: never, but ``solo``,
            which reads the head in every step.
    """

    def local(kind: ReadoutKind) -> Build:
        def build(costs: Costs, batch: int, devices: int, *_: object) -> Priced:
            often = refresh or (1 if kind == "solo" else None)  # which reads the head in every step unless told
            if often and 6 * devices * often > MOST_OPERATIONS:
                raise ValueError(f"{often} steps of {devices} stages are too many to simulate from refresh to refresh")
            return by_local_stages(costs, batch, devices, kind, refresh=often)

        return build

    return {
        "DDP": lambda costs, batch, devices, micros, network: by_data(costs, batch, devices, network),
        **{name: local(kind) for kind, name in SCHEMES.items()},
        "paper": lambda costs, batch, devices, micros, network: by_tree(costs, batch, devices, posterior=True),
        "tree": lambda costs, batch, devices, micros, network: by_tree(costs, batch, devices, posterior=False),
    }


SPLIT: dict[str, Build] = {
    "1F1B": lambda costs, batch, devices, micros, network: by_pipeline(costs, batch, devices, micros),
    "ZBV": lambda costs, batch, devices, micros, network: by_zero_bubble(costs, batch, devices, micros),
    "2BW": lambda costs, batch, devices, micros, network: by_late_pipeline(costs, batch, devices, micros),
}
"""Schemes that take micro-batches."""


@dataclass(frozen=True)
class Choice:
    """What a scheme costs, and where its time goes."""

    cost: Estimate
    fits: bool
    unlinked: float
    """Seconds a step if messages took no time."""

    @property
    def waits(self) -> float:
        """Seconds a step that the busiest device waits for others."""
        return _rest(self.unlinked, self.cost.busy)

    @property
    def link(self) -> float:
        """Seconds a step that messages add."""
        return _rest(self.cost.seconds, self.unlinked)


@dataclass(frozen=True)
class Plan:
    """What every scheme would cost."""

    batch: int
    devices: int
    network: Network
    alone: Choice
    """Backpropagation on one device."""
    choices: tuple[Choice, ...]
    """The fastest first."""
    refused: dict[str, str]
    """Why a scheme cannot be."""

    @property
    def best(self) -> Choice | None:
        """The fastest of what fits, one device among it."""
        return min((c for c in (self.alone, *self.choices) if c.fits), key=lambda c: c.cost.seconds, default=None)


def make_plan(
    costs: Costs,
    batch: int,
    devices: int,
    network: Network,
    memory: float | None = None,
    refresh: int | None = None,
) -> Plan:
    """Compares all schemes; those that take micro-batches with as many as are best for them.

    Args:
        costs: of the network.
        batch: samples of a step, of all devices together.
        devices: how many there are, all alike.
        network: what connects them.
        memory: bytes of a device; None: any.
        refresh: as of ``whole``.
    """
    choices, refused = [], {}
    for name, build in (whole(refresh) | SPLIT).items():
        found = []
        for micros in _micro_batches(batch, devices) if name in SPLIT else [1]:
            try:
                found.append(
                    _choice(lambda link, b=build, m=micros: b(costs, batch, devices, m, link), network, memory)
                )
            except ValueError as reason:
                refused[name] = str(reason)  # of as many micro-batches as can be
        if found:
            refused.pop(name, None)
            choices.append(min(found, key=lambda choice: (not choice.fits, choice.cost.seconds)))
    alone = _choice(lambda link: by_backpropagation(costs, batch), network, memory)
    return Plan(batch, devices, network, alone, tuple(sorted(choices, key=lambda c: c.cost.seconds)), refused)


def _choice(build: Callable[[Network], Priced], network: Network, memory: float | None) -> Choice:
    priced, free = build(network), Network()
    cost = estimate(priced, network)
    unlinked = build(free) if priced.reduced else priced  # whose messages are priced as operations
    return Choice(cost, memory is None or cost.memory <= memory, step_seconds(unlinked, free))


def _micro_batches(batch: int, devices: int) -> list[int]:
    """Numbers that a batch can be split into evenly: doubling ones."""
    numbers = [2**k for k in range(batch.bit_length()) if batch % 2**k == 0]
    return [m for m in numbers if m * devices * 2 <= MOST_OPERATIONS]


def growth(
    costs: Costs, batch: int, network: Network, blocks: int, devices: Sequence[int], refresh: int | None = None
) -> Iterator[tuple[str, list[tuple[int, float]]]]:
    """Seconds a step as a network grows with its devices: for every scheme pairs (N, seconds), N the blocks and the head.

    Args:
        costs: of a network whose blocks are repeated.
        blocks: of every device.
        devices: the numbers of devices.
        refresh: as of ``make_plan``.
    """
    alone: dict[str, Build] = {"bp": lambda costs, batch, *_: by_backpropagation(costs, batch)}
    for name, build in (alone | whole(refresh) | SPLIT).items():
        points = list(_grown(build, costs, batch, network, blocks, devices, split=name in SPLIT))
        if points:
            yield name, points


def _grown(
    build: Build, costs: Costs, batch: int, network: Network, blocks: int, devices: Sequence[int], split: bool
) -> Iterator[tuple[int, float]]:
    for number in devices:
        micros = _micro_batches(batch, number)[-1:] if split else [1]
        for micro in micros:
            try:
                priced = build(costs.repeated(blocks * number), batch, number, micro, network)
            except ValueError:  # such a split cannot be: the curve ends
                continue
            yield blocks * number + 1, step_seconds(priced, network)


COLUMNS = (
    "scheme",
    "micro-batches",
    "seconds a step",
    "bp = 1",
    "computes",
    "waits",
    "link",
    "work",
    "span",
    "messages",
    "MB sent",
    "MiB held",
    "fits",
)


def table(plan: Plan) -> list[tuple[str, ...]]:
    """Rows under ``COLUMNS``; seconds of a step, work and span as shares of those of backpropagation on one device."""
    alone = plan.alone.cost
    return [
        (
            cost.scheme,
            str(cost.micros),
            f"{cost.seconds:.4g}",
            f"{cost.seconds / alone.seconds:.2f}",
            f"{cost.busy:.4g}",
            f"{choice.waits:.4g}",
            f"{choice.link:.4g}",
            f"{cost.work / alone.work:.2f}",
            f"{cost.span / alone.span:.2f}",
            f"{cost.messages:g}",
            f"{cost.bytes / 1e6:.2f}",
            f"{cost.memory / 2**20:.1f}",
            "yes" if choice.fits else "no",
        )
        for choice in (plan.alone, *plan.choices)
        for cost in [choice.cost]
    ]


def as_json(plan: Plan) -> dict[str, Any]:
    """The same for programs, in seconds and bytes."""
    return {
        "schemes": [asdict(c.cost) | {"fits": c.fits, "unlinked": c.unlinked} for c in (plan.alone, *plan.choices)],
        "best": plan.best.cost.scheme if plan.best else None,
        "refused": plan.refused,
        "reasons": reasons(plan),
    }


def reasons(plan: Plan) -> list[str]:
    """Sentences that say which scheme is the fastest of what fits, where its time and that of others goes, and what cannot
    be."""
    best = plan.best
    if best is None:
        least = min((plan.alone, *plan.choices), key=lambda choice: choice.cost.memory).cost
        return [f"Nothing fits: {least.scheme} needs the least, {least.memory / 2**20:.1f} MiB on its fullest device."]
    said = [f"The fastest of what fits is {_where(best)}."]
    for choice in plan.choices:
        if choice is not best:
            said.append(f"{_where(choice)}{'' if choice.fits else '; but it does not fit'}.")
    return said + [f"{name} cannot be: {reason}." for name, reason in plan.refused.items()]


def _where(choice: Choice) -> str:
    """Where a step's time goes."""
    cost = choice.cost
    parts = [f"computes for {cost.busy:.3g}"]
    parts += [f"waits {choice.waits:.3g} for other devices"] if choice.waits > 0.01 * cost.seconds else []
    parts += [f"waits {choice.link:.3g} for messages"] if choice.link > 0.01 * cost.seconds else []
    micros = f" with {cost.micros} micro-batches" if cost.micros > 1 else ""
    return f"{cost.scheme}{micros}, {cost.seconds:.3g} s a step, of which its busiest device {', '.join(parts)}"


def _rest(total: float, part: float) -> float:
    """What is left, but for rounding."""
    return total - part if total - part > 1e-9 * total else 0.0
