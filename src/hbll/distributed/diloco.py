"""DiLoCo: processes that train apart and meet every few hundred steps (Douillard et al., arXiv 2311.08105).

    parameters = rule.parameters()
    optimizer, outer = torch.optim.AdamW(parameters, lr=1e-3), DiLoCo(parameters, every=100)
    for x, y in batches:                    # each process its own
        optimizer.zero_grad()
        rule(x, y).loss.backward()
        optimizer.step()
        outer.step()

Between two meetings nothing is sent.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hbll.distributed.share import average
from hbll.names import check_number

__all__ = ["DiLoCo"]


class DiLoCo:
    """The outer optimizer of processes that train replicas of one model, each by an optimizer of its own.

    Every so many steps the mean over processes of how far each has moved since they last met is taken for a gradient, by
    which SGD with Nesterov's momentum moves the point where they met; there all go on. Nothing else crosses a link: the
    size of the parameters, once in ``every`` steps. Inner optimizers keep their state. Buffers stay each process's own.

    Args:
        parameters: those of the replica of this process; at once set to those of the group's first process.
        every: inner steps between two meetings.
        learning_rate, momentum: of the outer optimizer.
        group: the processes that meet; by default all.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        every: int = 100,
        learning_rate: float = 0.7,
        momentum: float = 0.9,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        check_number("every", every, least=1)
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.every = every
        self.group = group
        self.taken = 0
        for parameter in self.parameters:
            dist.broadcast(parameter.detach(), group=group, group_src=0)
        self.met_at = [parameter.detach().clone() for parameter in self.parameters]
        self.outer = torch.optim.SGD(self.met_at, lr=learning_rate, momentum=momentum, nesterov=momentum > 0)

    def step(self) -> bool:
        """To be called after each step of the inner optimizer; whether the processes met."""
        self.taken += 1
        if self.taken % self.every:
            return False
        self.meet()
        return True

    @torch.no_grad()
    def meet(self) -> None:
        """A step of the outer optimizer, of all processes together."""
        moved = [anchor - parameter for anchor, parameter in zip(self.met_at, self.parameters, strict=True)]
        average(moved, self.group)
        for anchor, gradient in zip(self.met_at, moved, strict=True):
            anchor.grad = gradient
        self.outer.step()
        self.outer.zero_grad()
        for parameter, anchor in zip(self.parameters, self.met_at, strict=True):
            parameter.copy_(anchor)

    def state_dict(self) -> dict[str, Any]:
        """Where they met, the outer momentum, and the steps taken so far."""
        return {"met_at": self.met_at, "outer": self.outer.state_dict(), "taken": self.taken}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up what ``state_dict`` gave; the parameters are the module's to load."""
        for anchor, stored in zip(self.met_at, state["met_at"], strict=True):
            anchor.copy_(stored)
        self.outer.load_state_dict(state["outer"])
        self.taken = state["taken"]
