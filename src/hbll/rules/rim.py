"""Exits along the rim of the tree, trained end to end beside a rule: they keep short paths accurate."""

from typing import Any

import torch
from torch import Tensor

from hbll.calls import Context, apply, check_shape, out_of_order
from hbll.losses import Loss, mean_loss
from hbll.modes import still_statistics, tracking_norms
from hbll.network import Chain
from hbll.rule import Step

__all__ = ["rim_loss"]


def rim_loss(network: Chain, state: Tensor, context: Context, y: Any, loss: Loss, step: Step) -> Tensor:
    """The mean loss of the head after every block of the rim, from the embedded state (B, ...) on; counted in the step."""
    rim, errors = network.tree.rim, []
    with still_statistics(tracking_norms(network)):  # those of the chain are the ones to be deployed
        for n in rim:
            with out_of_order(f"block {n}", state):
                output = apply(f"block {n}", network.blocks[n - 1], state, context)
            check_shape(f"block {n}", output, state)
            state = output
            errors.append(mean_loss(loss, network.read(state, context), y))
    step.count(3 * len(rim), 2 * len(rim))
    return torch.stack(errors).mean()
