"""Blocks that sleep where others compute, so that more stages than a machine has cores may run as if each had its own."""

import time
from typing import Any

import torch
from torch import Tensor, nn

import hbll
from hbll.distributed import Worker
from hbll.distributed.simulate import Op, Span


class _Sleep(torch.autograd.Function):
    """The sum of a state and a weight, and as many seconds for each product of the walk back as for it."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, weight: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return state + weight

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        time.sleep(ctx.seconds * sum(ctx.needs_input_grad[:2]))
        return gradient if ctx.needs_input_grad[0] else None, gradient.sum(0), None


class SleepingBlock(nn.Module):
    """A block on states (B, F) with a weight for each feature."""

    def __init__(self, features: int, seconds: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(features))
        self.seconds = seconds

    def forward(self, state: Tensor) -> Tensor:
        return _Sleep.apply(state, self.weight, self.seconds)


class Head(nn.Module):
    """Two classes, from two of the features: as good as no time."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, state: Tensor) -> Tensor:
        return self.linear(state[:, :2])


class Embed(nn.Module):
    """A learnt state, the same for every sample."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.state = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        return self.state.expand(len(x), -1)


def train(
    name: str, sizes: tuple[int, ...], seconds: float, state_bytes: int, steps: int, refresh: int | None
) -> dict[Op, Span]:
    """Trains a stage in every process by a rule; when each step of this process's was over, as an operation ``U``.

    Args:
        name: stream, with one jump or all, greedy or solo.
        sizes: blocks of every stage.
        seconds: of a block's forward evaluation.
        state_bytes: of the batch's states, which are float32.
        refresh: steps after which copies are refreshed; None for never, of solo for never but at the beginning.
    """
    torch.manual_seed(0)
    features = state_bytes // 4
    network = hbll.Chain(Embed(features), [SleepingBlock(features, seconds) for _ in range(sum(sizes))], Head())
    name, _, jumps = name.partition(", ")
    options: dict[str, Any] = {} if name == "solo" else {"copies": True}
    options |= {"spine": "last"} if jumps else {}
    options |= {"refresh": refresh or steps + len(sizes)} if name == "solo" or refresh else {}
    worker = Worker(hbll.make_rule(name, network, stage=sizes, engine="loop", **options))
    optimizer = torch.optim.SGD(worker.parameters(), lr=1e-3)
    x, y = torch.zeros(1, 1), torch.zeros(1, dtype=torch.long)
    times = {}
    for step in range(steps):
        began = time.perf_counter()
        optimizer.zero_grad()
        worker.backward(x, y)
        optimizer.step()
        times[Op("U", worker.stage - 1, 0, step)] = Span(began, time.perf_counter())
    worker.finish()
    return times
