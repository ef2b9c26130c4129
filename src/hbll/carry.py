"""What a rule keeps from step to step: mini-batches on their way, running means."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

__all__ = ["Carry", "concatenate", "gathering", "map_tensors", "own_copy", "tensor_bytes"]


class Carry:
    """A nest of dicts, lists, tuples and tensors that a step leaves for the next one, None at first.

    It is no part of a state_dict, which holds tensors alone: ``Rule.carry`` and ``Rule.load_carry`` put it into checkpoints.
    """

    def __init__(self) -> None:
        self.nest: Any = None
        self._next: Any = None

    def on(self, device: torch.device) -> Any:
        """The nest, its containers new and its tensors on that device."""
        return None if self.nest is None else map_tensors(lambda tensor: tensor.to(device), self.nest)

    def leave(self, nest: Any) -> None:
        """Puts another nest in its place, once the step is complete: one that fails leaves everything as it was."""
        self._next = nest

    def begin(self) -> None:
        """Forgets what a step that failed was about to leave."""
        self._next = None

    def complete(self) -> None:
        """Takes up what the step has left, if it has."""
        if self._next is not None:
            self.nest, self._next = self._next, None


def map_tensors(change: Callable[[Tensor], Tensor], nest: Any) -> Any:
    """The same nest of dicts, lists and tuples with every tensor changed."""
    return _pytree.tree_map_only(Tensor, change, nest)


def gathering(nest: Any) -> tuple[Any, dict[Tensor, Tensor]]:
    """The same nest with leaves, which gather gradients, in place of the tensors that require some; the leaf of each."""
    leaves: dict[Tensor, Tensor] = {}

    def leaf(tensor: Tensor) -> Tensor:
        if tensor.requires_grad and tensor not in leaves:  # one that occurs twice gathers both gradients
            leaves[tensor] = tensor.detach().requires_grad_()
        return leaves.get(tensor, tensor)

    return map_tensors(leaf, nest), leaves


def tensor_bytes(nest: Any) -> int:
    """Bytes of all tensors of a nest."""
    return sum(leaf.nbytes for leaf in _pytree.tree_leaves(nest) if isinstance(leaf, Tensor))


def own_copy(nest: Any) -> Any:
    """A batch to be kept: loaders may use their buffers again."""
    return map_tensors(lambda tensor: tensor.detach().clone(), nest)


def concatenate(nests: Sequence[Any]) -> Any:
    """Nests of one form as one, their tensors one after the other; what is no tensor is the first one's."""
    return _pytree.tree_map(lambda *parts: torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0], *nests)
