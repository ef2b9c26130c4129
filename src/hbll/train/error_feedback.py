"""Error feedback, which makes up for gradients that come late."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from hbll.names import check_number

__all__ = ["ErrorFeedback"]


class ErrorFeedback(Optimizer):
    """An optimizer whose update u, all of it (rate, momentum, weight decay), is corrected by how it differs from the one
    before (arXiv 2606.30634):

        x <- x - u - c (u - u'),    u' the update of the step before, 0 at first.

    Summed up, x is where the updates lead and c times the newest one beyond: with c = 1 about where it will be one step
    later, when a gradient that is a step late arrives. One more copy of the parameters is held.

    Schedules, clipping and scaling see one optimizer: it has the parameter groups of the one inside.

    Args:
        optimizer: any of torch's.
        strength: c.
    """

    def __init__(self, optimizer: Optimizer, strength: float = 1.0) -> None:
        check_number("strength", strength, least=0.0)
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.param_groups = optimizer.param_groups  # the same list: what is added to one is added to both
        self.optimizer = optimizer
        self.strength = strength

    @property
    def _parameters(self) -> list[torch.Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step of the optimizer inside, and the correction.

        Args:
            closure: evaluates the loss again, which is returned; as of the optimizer inside.
        """
        parameters = self._parameters
        updates = [parameter.clone() for parameter in parameters]
        loss = self.optimizer.step(closure)
        torch._foreach_sub_(updates, parameters)
        before = [self.state[p]["update"] if p in self.state else torch.zeros_like(p) for p in parameters]
        torch._foreach_sub_(parameters, torch._foreach_sub(updates, before), alpha=self.strength)
        for parameter, update in zip(parameters, updates, strict=True):
            self.state[parameter]["update"] = update
        return loss

    def state_dict(self) -> dict[str, Any]:
        """That of the optimizer inside, and the newest update of each parameter in turn; None before the first step."""
        updates = [self.state[p]["update"] if p in self.state else None for p in self._parameters]
        return {**self.optimizer.state_dict(), "updates": updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up what ``state_dict`` gave.

        Raises:
            ValueError: it is of other parameters, or of an optimizer without error feedback.
        """
        if "updates" not in state_dict:
            raise ValueError("the state is of an optimizer without error feedback")
        self.optimizer.load_state_dict(state_dict)
        self.param_groups = self.optimizer.param_groups
        self.state.clear()
        for parameter, update in zip(self._parameters, state_dict["updates"], strict=True):
            if update is not None:
                self.state[parameter]["update"] = update.detach().clone().to(parameter)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "optimizer": self.optimizer, "strength": self.strength}
