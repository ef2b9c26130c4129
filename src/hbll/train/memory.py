"""Peak memory of one training step, beyond the weights, their gradients, the optimizer and the batch."""

import gc
import weakref
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hbll.carry import tensor_bytes
from hbll.rule import Rule

__all__ = ["peak_memory", "step_memory"]


def step_memory(rule: Rule, x: Any, y: Any, by: Literal["backward", "forward"] = "backward") -> int:
    """Most bytes of tensors alive at once while a step is made, beside the ``.grad`` of every weight, which is there before.

    Args:
        rule, x, y: as for ``rule(x, y)``.
        by: ``rule.backward(x, y)``, or ``rule(x, y).loss.backward()``, which holds a second set of gradients.
    """

    def step() -> None:
        if by == "backward":
            rule.backward(x, y)
        else:
            taken = rule(x, y)  # held on to, as a training loop does
            taken.loss.backward()

    before = None
    while (kept := _kept_bytes(rule)) != before:  # until pipelines are full
        before = kept
        step()
    for parameter in rule.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    return peak_memory(step, next(rule.parameters()).device)


def _kept_bytes(rule: Rule) -> int:
    return tensor_bytes([carry.nest for carry in rule.carries().values()])


def peak_memory(step: Callable[[], object], device: torch.device) -> int:
    """Most bytes of tensors alive at once that a function makes.

    On a GPU as the caching allocator counts them. On the CPU, where several rules share one process and the peak of the
    process would tell nothing of each, every storage made by an operation is followed until it is freed; scratch memory
    within an operation is not seen.
    """
    if device.type == "cuda":
        gc.collect()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
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
