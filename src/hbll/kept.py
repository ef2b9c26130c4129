"""What a rule keeps from step to step: mini-batches on their way, running means."""

from collections.abc import Callable, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from hbll.network import TreeNetwork
from hbll.trace import Trace

__all__ = ["Kept", "concatenate", "map_tensors", "own_copy"]


class Kept(nn.Module):
    """A nest of dicts, lists, tuples and tensors that a step leaves for the next one, None at first.

    It is part of the state_dict, moves with the rule that has it, and is of one network, cut into the same stages. A copy,
    or what a state_dict brought, belongs to the network that it is first used with.
    """

    def __init__(self) -> None:
        super().__init__()
        self.nest: Any = None
        self._stages: list[int] = []
        self._network: ref[TreeNetwork] | None = None

    def of(self, trace: Trace) -> Any:
        """The nest, its containers new and its tensors on the device of the states.

        Raises:
            ValueError: it is of another network, or of other stages.
        """
        if self.nest is None:
            return None
        if self._network is not None and self._network() is not trace.network:
            raise ValueError(
                "the objective holds states of another network: take one objective for each network, or call "
                "objective.reset() before the next one's training"
            )
        if self._stages != _sizes(trace):
            raise ValueError(
                f"the objective holds states of stages of {_listed(self._stages)} blocks, and the network is cut into "
                f"stages of {_listed(_sizes(trace))}: choose the same stage=, or call objective.reset()"
            )
        device = trace.boundary[0].device
        return map_tensors(lambda tensor: tensor.to(device), self.nest)

    def leave(self, trace: Trace, nest: Any) -> None:
        """Puts another nest in its place, once the step is complete: one that fails leaves everything as it was."""
        network, stages = ref(trace.network), _sizes(trace)

        def write() -> None:
            self.nest, self._network, self._stages = nest, network, stages

        trace.at_end.append(write)

    def reset(self) -> None:
        """Forgets everything."""
        self.nest, self._network = None, None

    def get_extra_state(self) -> dict[str, Any]:
        """Everything, for checkpoints."""
        return {"nest": self.nest, "stages": self._stages}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Takes up what ``get_extra_state`` gave."""
        # Copies: tensors in a file's memory lie unaligned, on which kernels round otherwise.
        self.nest = own_copy(state["nest"])
        self._stages, self._network = state["stages"], None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Kept":
        self.nest = map_tensors(fn, self.nest)
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_network": None}


def _sizes(trace: Trace) -> list[int]:
    return [len(numbers) for numbers in trace.stages.numbers]


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes))


def map_tensors(change: Callable[[Tensor], Tensor], nest: Any) -> Any:
    """The same nest of dicts, lists and tuples with every tensor changed."""
    return _pytree.tree_map_only(Tensor, change, nest)


def own_copy(nest: Any) -> Any:
    """A batch to be kept: loaders may use their buffers again."""
    return map_tensors(lambda tensor: tensor.detach().clone(), nest)


def concatenate(nests: Sequence[Any]) -> Any:
    """Nests of one form as one, their tensors one after the other; what is no tensor is the first one's."""
    return _pytree.tree_map(lambda *parts: torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0], *nests)
