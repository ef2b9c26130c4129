"""Noticing that training diverges, and finding where a run left the finite numbers."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from hbll.calls import apply
from hbll.network import Chain
from hbll.rule import Rule, Step

LOOK_EVERY = 100
"""Steps between two looks at how training goes. On a GPU each look waits for the device."""


class DivergedError(ValueError):
    """The loss or a weight is NaN or infinite, by a step counted from the beginning of the run, from 1."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class DivergenceWarning(UserWarning):
    """The loss grows without bound, or is NaN or infinite."""


GROWN = 1000.0
"""Times its first value, or 1 if that is less, by which a loss has grown without bound. While a pipeline fills, losses of
more and more stages are added up; of far more stages than people train."""


class Growth:
    """Warns once, by a `DivergenceWarning`, when losses have grown without bound, or are no longer finite."""

    def __init__(self) -> None:
        self.first: Tensor | None = None
        self.largest = torch.zeros(())
        self.steps = 0
        self.warned = False

    def add(self, steps: Sequence[Step]) -> None:
        """Notes the losses of a training step; does not wait for the device."""
        self.steps += 1
        for step in steps:
            loss = step.loss.detach().abs().float()
            if self.first is None:
                self.first = self.largest = loss
            self.largest = torch.maximum(self.largest, loss)  # NaN stays NaN

    def look(self) -> None:
        """Warns if it has to; waits for the device."""
        if self.first is None or self.warned:
            return
        first, largest = self.first.item(), self.largest.item()
        if not largest < GROWN * max(1.0, first):
            self.warned = True
            warnings.warn(
                f"training diverges: within {self.steps} steps the loss went from {first:.3g} to {largest:.3g}; "
                "try a lower learning rate, or clip gradients",
                DivergenceWarning,
                stacklevel=2,
            )


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all of them are; one synchronisation with the device."""
    finite = [tensor.isfinite().all() for tensor in tensors]
    return not finite or bool(torch.stack(finite).all())


def place_in_weights(rule: Rule) -> str | None:
    """The first part along the chain with a weight that is not finite; None when there is none."""
    return next((place for place, part in _parts(rule).items() if not all_finite(part.parameters())), None)


def place_in_step(rule: Rule, x: Any, y: Any) -> str | None:
    """Where the losses of a step stop being finite, None if they do not; nothing is learned from it.

    It is the first part along the chain whose output is not finite. If all are, it is the stage whose loss is not: a rule
    may evaluate blocks on other states than the chain's, or on batches that came in before.
    """
    step = Step()
    with torch.random.fork_rng(range(torch.cuda.device_count())):  # the step itself is to draw the same numbers
        stages = next((loss.stages for loss in rule.losses(x, y, step) if not loss.value.isfinite()), None)
    if stages is None:
        return None
    reported = [k for k, report in step.reports.items() if not all(map(_finite, asdict(report).values()))]
    if not isinstance(rule.network, Chain):  # a recurrent one, whose reports are by time
        return f"time {reported[0]}" if reported else "the cells"
    if place := _place_in_chain(rule.network, x):
        return place
    stage = next((k for k in stages if k in reported), stages[0])
    return f"the {stage}" if isinstance(stage, str) else rule.stages[stage - 1].title


def _place_in_chain(network: Chain, x: Any) -> str | None:
    with torch.no_grad():
        state, context = network.embedded(x)
        if not state.isfinite().all():
            return "the embed"
        for n, block in enumerate(network.blocks, 1):
            state = apply(f"block {n}", block, state, context)
            if not state.isfinite().all():
                return f"block {n}"
        return None if network.read(state, context).isfinite().all() else "the head"


def _finite(value: float | None) -> bool:
    return value is None or math.isfinite(value)


def _parts(rule: Rule) -> Mapping[str, nn.Module]:
    network = rule.network
    if not isinstance(network, Chain):
        return rule.parts
    blocks = {f"block {n}": block for n, block in enumerate(network.blocks, 1)}
    return {"the embed": network.embed, **blocks, "the head": network.head}
