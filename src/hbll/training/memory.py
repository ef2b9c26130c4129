"""Peak memory of one training step, beyond the weights, the optimizer and the batch."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hbll.data import Samples
from hbll.protocols import Network, TrainingRule


def step_memory(network: Network, objective: TrainingRule, batch: Samples) -> int:
    """Most bytes of tensors alive at once while one step's gradients are computed, the gradients among them.

    On a GPU as the caching allocator counts them. On the CPU, where several methods share one process and the peak of
    the process would tell nothing of each, every storage made by an operation is followed until it is freed; scratch
    memory within an operation is not seen. `network` is left with gradients.
    """

    def step() -> None:
        taken = objective(network, batch.inputs, batch.labels)  # held on to, as a training loop does
        taken.loss.backward()

    for _ in objective.layout(network).parts:  # a rule may keep a batch for each part, which then is not the step's
        step()
    network.zero_grad()
    objective.zero_grad()
    gc.collect()
    return _cuda_peak(step) if batch.inputs.is_cuda else _cpu_peak(step)


def _cuda_peak(step: Callable[[], None]) -> int:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - before


def _cpu_peak(step: Callable[[], None]) -> int:
    with _LiveBytes() as live:
        step()
    return live.peak


class _LiveBytes(TorchDispatchMode):
    """Bytes of the storages made inside that are still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_address(tensor) for tensor in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            address = _address(tensor)
            if address not in given and address not in self.alive:  # else a view, or written in place
                self._made(tensor.untyped_storage(), address)
        return result

    def _made(self, storage: torch.UntypedStorage, address: int) -> None:
        size = storage.nbytes()
        self.alive.add(address)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, address, size)

    def _freed(self, address: int, size: int) -> None:
        self.alive.discard(address)
        self.now -= size


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(nest: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(nest) if isinstance(leaf, Tensor)]
