"""Modules that wait for the shapes of states, and whose parameters an optimizer can hold before."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from hbll.carry import own_copy

__all__ = ["Waiting"]


class _Unshaped(UninitializedParameter):
    # torch's own cannot be frozen before it has a shape.
    _allowed_methods = (*UninitializedParameter._allowed_methods, Tensor.requires_grad_)  # pyrefly: ignore


class Waiting(nn.Module):
    """Stands where a module will be once its shapes are known, with parameters that have none yet.

    The module then takes these very parameters for its own, so that an optimizer made before trains it. A ``state_dict``
    has nothing of it; one that is loaded is kept for the module.

    Args:
        parameters: how many the module will have, at most; those too many are left without an element.
        like: what says device and precision while there is no shape, which an optimizer's state is loaded by.
    """

    def __init__(self, parameters: int, like: Tensor) -> None:
        super().__init__()
        for i in range(parameters):
            self.register_parameter(str(i), _Unshaped(device=like.device, dtype=like.dtype))  # pyrefly: ignore
        self.loaded: dict[str, Tensor] = {}

    def filled(self, module: nn.Module) -> nn.Module:
        """The module, which has the loaded weights, or else its own, in the parameters that were waiting for it; trained
        are those that both have as trained."""
        if self.loaded:
            module.load_state_dict(self.loaded)
        waiting = (p for p in self.parameters() if isinstance(p, UninitializedParameter))
        for part in module.modules():
            for name, made in list(part.named_parameters(recurse=False)):
                parameter = next(waiting)
                parameter.materialize(made.shape, made.device, made.dtype)
                parameter.requires_grad_(parameter.requires_grad and made.requires_grad)
                with torch.no_grad():
                    parameter.copy_(made)
                setattr(part, name, parameter)
        for spare in waiting:
            spare.materialize((0,))
        return module

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Saves nothing."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:  # pyrefly: ignore[bad-override]
        own = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        self.loaded = own_copy(own)
