"""Backpropagation's gradient, applied some steps late: what asynchronous pipelines with several weight versions compute.

With two versions of the weights (PipeDream-2BW, Narayanan et al., arXiv 2006.09503) every micro-batch is walked back with
the weights that it passed with, and its gradient moves the newer version one step later:

    theta_{t+1} = theta_t - u(grad L(theta_{t-1}, batch_{t-1})),

which one process computes exactly. Made for optimizers of high momentum and for error feedback
(``hbll.train.ErrorFeedback``).
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hbll.carry import Carry
from hbll.names import check_number
from hbll.network import Chain
from hbll.rule import StageLoss, Step, attach_gradients
from hbll.rules.backprop import Backpropagation

__all__ = ["TwoBufferedWeights"]


class TwoBufferedWeights(Backpropagation):
    """Backpropagation whose gradients are kept and handed to the optimizer ``delay`` steps later; the first ``delay`` steps
    move nothing.

    Work and span of a step are backpropagation's, as one device makes it. On p devices, at least p micro-batches and stages
    of equal cost a step takes 1 / p of that time, for the pipeline is never flushed; each device then holds two versions of
    its weights and the states of p micro-batches, states go one way over a link and gradients the other. Here ``delay`` more
    sets of gradients are held, and another one until the step's own are complete.

    Args:
        network: the network to train; states may change shape.
        delay: steps by which gradients are late; 1 for two versions of the weights.
        options: ``path``, ``rim`` and ``loss``, as of ``Backpropagation``.
    """

    late = True

    def __init__(self, network: Chain, *, delay: int = 1, **options: Any) -> None:
        super().__init__(network, **options)
        check_number("delay", delay, least=1)
        self.delay = delay
        self.flight = Carry()
        """Gradients that are still to be applied, by parameter, oldest first."""

    def losses(self, x: Any, y: Any, step: Step) -> Iterator[StageLoss]:
        if x is None and not self.in_flight:
            raise ValueError("there is no mini-batch in flight: hand one over")
        if not self.training:
            raise ValueError(
                "a rule of late gradients has no gradients of the batch at hand to look at: measure network(x) instead, or "
                "another rule"
            )
        trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
        device = next(self.network.parameters()).device
        waiting: list[dict[str, Tensor]] = self.flight.on(device) or []
        value = torch.zeros((), device=device)
        if x is not None:
            (loss,) = super().losses(x, y, step)
            value = loss.value.detach()
            waiting.append(self._found(loss.value, trained, step))
            del loss
        due = waiting.pop(0) if waiting and (x is None or len(waiting) > self.delay) else {}
        self.flight.leave(waiting)
        moved = {name: gradient for name, gradient in due.items() if name in trained}
        if moved:
            value = attach_gradients(value, [trained[name] for name in moved], list(moved.values()))
        yield StageLoss(1, value)

    @staticmethod
    def _found(value: Tensor, trained: Mapping[str, Tensor], step: Step) -> dict[str, Tensor]:
        """The gradients of a loss, by the names of those parameters that it reaches."""
        if not value.requires_grad:
            return {}
        # Scaled on the way, or half precision loses them.
        found = torch.autograd.grad(value * step.scale, list(trained.values()), allow_unused=True)
        return {
            name: step.unscaled(gradient) for name, gradient in zip(trained, found, strict=True) if gradient is not None
        }

    @property
    def in_flight(self) -> bool:
        return bool(self.flight.nest)

    def carries(self) -> Mapping[str, Carry]:
        return {"late": self.flight}
