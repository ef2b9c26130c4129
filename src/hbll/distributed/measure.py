"""What the parts of a network cost on this machine, measured."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hbll.calls import apply, evaluate
from hbll.carry import map_tensors, tensor_bytes
from hbll.distributed.cost import Costs, Line, Part
from hbll.losses import Loss, mean_loss
from hbll.network import Chain

__all__ = ["measured_costs"]

REPEATS = 5
"""Calls of which the median counts, after one to warm up."""


def measured_costs(
    network: Chain, x: Any, y: Any, loss: Loss, make_optimizers: Callable[[], Sequence[torch.optim.Optimizer]]
) -> Costs:
    """The costs of every part, from calls on the batch and on a quarter of it; the optimizers step once or more.

    Args:
        network: whose parameters the optimizers move: they are not the same afterwards.
        x, y: a batch, tensors or nests of them, samples first.
        loss: the label's loss.
        make_optimizers: of the network's parameters.
    """
    samples = len(network.embedded(x)[0])
    few = max(min(2, samples), samples // 4)  # batch norms may want two
    sizes = [few, samples] if few < samples else [samples]
    found: list[list[_Calls]] = []
    for size in sizes:
        given, labels = map_tensors(lambda tensor, size=size: tensor[:size].clone(), (x, y))  # of a storage of its own
        found.append(_calls(network, given, labels, loss))
    modules = [network.embed, *network.blocks, network.head]
    parts = [
        Part(
            *(_line([(size, getattr(call, what)) for size, call in zip(sizes, calls, strict=True)]) for what in _TIMES),
            parameters=float(sum(p.nbytes for p in module.parameters() if p.requires_grad)),
            graph=calls[-1].graph / samples,
            state=calls[-1].state / samples,
        )
        for module, calls in zip(modules, zip(*found, strict=True), strict=True)
    ]
    update, kept = _optimizer(network, make_optimizers())
    return Costs(parts[0], tuple(parts[1:-1]), parts[-1], float(tensor_bytes(y)) / samples, update, kept)


_TIMES = ("forward", "backward", "inputs")


class _Calls:
    """What one part took on one batch; seconds and bytes.

    Args:
        call: evaluates it.
        state: what it is evaluated on, a leaf; None of the embed.
        module: whose parameters it has.
    """

    def __init__(self, call: Callable[[], Tensor], state: Tensor | None, module: nn.Module) -> None:
        parameters = [p for p in module.parameters() if p.requires_grad]
        own = {p.untyped_storage().data_ptr() for p in module.parameters()}
        saved: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self.output = call()
        saved.pop(self.output.untyped_storage().data_ptr(), None)  # which counts as the input of what comes next
        self.graph, self.state = sum(saved.values()), self.output.nbytes
        given = [state] if state is not None and state.requires_grad else []

        def back(to: Sequence[Tensor]) -> float:
            if not (to and self.output.requires_grad):
                return 0.0
            gradient = torch.ones_like(self.output)
            return _median(
                lambda: torch.autograd.grad(self.output, to, gradient, retain_graph=True, allow_unused=True), state
            )

        self.forward = _median(call, state)
        self.backward = back([*parameters, *given])
        self.inputs = min(back(given), self.backward)


def _calls(network: Chain, x: Any, y: Any, loss: Loss) -> list[_Calls]:
    """Embed, blocks and head on one batch."""
    found = [_Calls(lambda: network.embedded(x)[0], None, network.embed)]
    context = network.embedded(x)[1]
    for number, block in enumerate(network.blocks, 1):
        leaf = _leaf(found[-1].output)
        found.append(_Calls(lambda z=leaf, b=block, n=number: apply(f"block {n}", b, z, context), leaf, block))
    leaf = _leaf(found[-1].output)
    found.append(_Calls(lambda: mean_loss(loss, evaluate(network.head, leaf, context), y), leaf, network.head))
    return found


def _leaf(state: Tensor) -> Tensor:
    return state.detach().requires_grad_(state.is_floating_point())


def _line(points: Sequence[tuple[int, float]]) -> Line:
    """Through one or two points of samples and seconds; neither part is negative."""
    (few, fast), (many, slow) = points[0], points[-1]
    if few == many:
        return Line(0.0, slow / many)
    each = min(max(0.0, (slow - fast) / (many - few)), slow / many)
    return Line(slow - each * many, each)


def _median(call: Callable[[], object], on: Tensor | None) -> float:
    """Seconds of a call."""
    wait = torch.cuda.synchronize if on is not None and on.is_cuda else lambda: None
    call()
    found = []
    for _ in range(REPEATS):
        wait()
        began = time.perf_counter()
        call()
        wait()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def _optimizer(network: Chain, optimizers: Sequence[torch.optim.Optimizer]) -> tuple[float, float]:
    """Seconds of a step for a byte of parameters, and bytes kept for one."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)

    def step() -> None:
        for optimizer in optimizers:
            optimizer.step()

    seconds, total = _median(step, parameters[0]), sum(p.nbytes for p in parameters)
    for parameter in parameters:
        parameter.grad = None
    kept = sum(tensor_bytes(state) for optimizer in optimizers for state in optimizer.state.values())
    return seconds / total, kept / total
