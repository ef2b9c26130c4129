"""Finding where a training run left the finite numbers."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn


class DivergedError(ValueError):
    """The loss or a weight is NaN or infinite."""


def all_finite(parameters: Iterable[Tensor]) -> bool:
    """Whether all of them are; one synchronisation with the device."""
    finite = [parameter.isfinite().all() for parameter in parameters]
    return not finite or bool(torch.stack(finite).all())


def place_in_loss(walk: Iterable[int], reports: Mapping[int, Any]) -> str:
    """The first node, in the order in which a step's losses come about, with a term that is not finite."""
    for node in walk:
        if node in reports and not all(_finite(term) for term in asdict(reports[node]).values()):
            return f"node {node}"
    return "the head"


def place_in_chain(parts: Mapping[str, nn.Module], inputs: Tensor) -> str:
    """The first part along the chain whose output is not finite, for rules that work on the chain's own states."""
    with torch.no_grad():
        state = inputs
        for place, part in parts.items():
            state = part(state)
            if not state.isfinite().all():
                return place
    return "the head"


def place_in_weights(parts: Mapping[str, nn.Module]) -> str | None:
    """The first part along the chain with a weight that is not finite; None when there is none."""
    return next((place for place, part in parts.items() if not all_finite(part.parameters())), None)


def _finite(term: float | Tensor | None) -> bool:
    return term is None or math.isfinite(term)
