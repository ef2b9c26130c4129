"""Finding where a training run left the finite numbers."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from hbll.network import Chain, apply
from hbll.rule import Rule, Step


class DivergedError(ValueError):
    """The loss or a weight is NaN or infinite."""


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
