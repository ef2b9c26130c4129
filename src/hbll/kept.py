"""What a module keeps from step to step: buffers whose shape is known only once data has been seen, and batches."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

__all__ = ["map_tensors", "own_copy", "register_late_buffers"]


def register_late_buffers(module: nn.Module, *names: str) -> None:
    """Registers buffers that are None until the module assigns them, and that load whatever a state_dict holds of them."""
    for name in names:
        module.register_buffer(name, None)

    def make_room(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        for name in names:
            saved = state_dict.get(prefix + name)
            setattr(module, name, None if saved is None else torch.empty_like(saved))

    module.register_load_state_dict_pre_hook(make_room)


def map_tensors(change: Callable[[Tensor], Tensor], nest: Any) -> Any:
    """The same nest of dicts, lists and tuples with every tensor changed."""
    return _pytree.tree_map_only(Tensor, change, nest)


def own_copy(nest: Any) -> Any:
    """A batch to be kept: loaders may use their buffers again."""
    return map_tensors(lambda tensor: tensor.detach().clone(), nest)
