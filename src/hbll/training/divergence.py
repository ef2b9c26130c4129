"""Finding where a training run left the finite numbers."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from hbll.network import TreeNetwork
from hbll.tree import Tree


class DivergedError(ValueError):
    """The loss or a weight is NaN or infinite."""


def all_finite(module: nn.Module) -> bool:
    """Whether every parameter is; one synchronisation with the device."""
    return bool(torch.stack([parameter.isfinite().all() for parameter in module.parameters()]).all())


def place_in_loss(tree: Tree, reports: Mapping[int, Any]) -> str:
    """The first node, in the order in which the tree is walked, with a term that is not finite."""
    for node in (node for level in tree.levels for node in level):
        if node in reports and not all(_finite(term) for term in asdict(reports[node]).values()):
            return f"node {node}"
    return "the head"


def place_in_chain(network: TreeNetwork, stages: Any, inputs: Tensor) -> str:
    """The first part along the chain whose output is not finite, for rules that work on the chain's own states."""
    with torch.no_grad():
        state = network.embed(inputs)
        if not state.isfinite().all():
            return "the embed"
        for n, block in enumerate(network.blocks, 1):
            state = block(state)
            if not state.isfinite().all():
                return f"node {stages.of(n)}"
    return "the head"


def place_in_weights(network: nn.Module, stages: Any) -> str | None:
    """The first part along the chain with a weight that is not finite; None when there is none.

    `stages` are the rule's: where the network has blocks, they know which node holds which.
    """
    for name, parameter in network.named_parameters():
        if not parameter.isfinite().all():
            part, *rest = name.split(".")
            return f"node {stages.of(int(rest[0]) + 1)}" if part == "blocks" else f"the {part}"
    return None


def _finite(term: float | Tensor | None) -> bool:
    return term is None or math.isfinite(term)
