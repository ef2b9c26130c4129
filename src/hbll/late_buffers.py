"""Buffers whose shape is known only once data has been seen, such as states in flight."""

from typing import Any

import torch
from torch import nn

__all__ = ["register_late_buffers"]


def register_late_buffers(module: nn.Module, *names: str) -> None:
    """Registers buffers that are None until the module assigns them, and that load whatever a state_dict holds of them."""
    for name in names:
        module.register_buffer(name, None)

    def make_room(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        for name in names:
            saved = state_dict.get(prefix + name)
            setattr(module, name, None if saved is None else torch.empty_like(saved))

    module.register_load_state_dict_pre_hook(make_room)
