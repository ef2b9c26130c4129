"""The asynchronous pipeline, the rival of ``stream`` at equal throughput: exact gradients, but late.

Stages work on successive mini-batches as in ``stream``, but the gradient of a mini-batch travels back one stage a step, so
that stage n of S learns from it 2 (S - n) steps after it passed (PipeDream, Harlap et al., arXiv 1806.03377). The stage's
input is kept and evaluated again with the weights of the day, which no stash of old weights is needed for (as with
activation recomputation in PipeMare, Yang et al., arXiv 1910.05124).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hbll.credit import Credit, train_head
from hbll.kept import map_tensors, own_copy
from hbll.rule import Rule
from hbll.trace import Trace, attach_gradients

__all__ = ["LateCredit"]


class LateCredit(Credit):
    """Gradients that arrive from the stage after one step later than that stage had them."""

    def __init__(self, rule: Rule) -> None:
        super().__init__(rule)
        self.waiting: dict[int, list[Tensor]] = {}
        """Inputs whose gradients are still to come, oldest first, by stage; 0 is the embed."""
        self.arriving: dict[int, Tensor] = {}
        """Gradients at the outputs of the oldest of them, by stage."""

    def finish(self, trace: Trace) -> None:
        if not self.training:
            raise ValueError("an asynchronous pipeline has no gradients of the batch at hand to look at")
        self.waiting.setdefault(0, []).append(own_copy(trace.x))
        for wave in trace.waves:
            for n, state in zip(wave.nodes, wave.inputs.detach().unbind(0), strict=True):
                self.waiting.setdefault(n, []).append(state)
        arriving, self.arriving = self.arriving, {}
        last = trace.stages.nodes[-1]
        if any(last in wave.nodes for wave in trace.waves):
            labels = trace.y if trace.labels is None else trace.labels[last - 1]
            _, arriving[last] = train_head(trace, last, trace.outputs((last,))[0], labels)
        if not arriving:  # the pipeline still fills: a step that moves nothing
            embedded = trace.boundary[0]
            trained = (p for p in trace.network.parameters() if p.requires_grad)
            leaf = embedded if embedded.requires_grad else next(trained, embedded)
            nothing = attach_gradients(embedded.new_zeros(()), [leaf], [torch.zeros_like(leaf)])
            trace.terms.append(("embed", nothing))
            return
        # Nothing that arrives in this step depends on another arrival: all stages could do this at once.
        for n, gradient in arriving.items():
            state = self.waiting[n].pop(0)
            if n == 0:
                embedded = trace.network.embed(state)
                trace.terms.append(("embed", attach_gradients(gradient.new_zeros(()), [embedded], [gradient])))
                continue
            state = state.requires_grad_()
            evaluation = trace.engine((n,), state.unsqueeze(0))
            at_input, *for_parameters = torch.autograd.grad(
                evaluation.outputs, [state, *evaluation.parameters], gradient.unsqueeze(0), materialize_grads=True
            )
            self.arriving[n - 1] = at_input
            term = attach_gradients(gradient.new_zeros(()), evaluation.parameters, for_parameters)
            trace.terms.append(((n,), term))
            blocks = trace.stages.size([n])
            # The last stage's gradient is there when its output is, the others' since the step before.
            trace.count(blocks, blocks)
            trace.count(2 * blocks, 2 * blocks)

    def get_extra_state(self) -> dict[str, Any]:
        """Everything in flight, for checkpoints."""
        return {
            "waiting": {str(n): list(states) for n, states in self.waiting.items()},
            "arriving": {str(n): gradient for n, gradient in self.arriving.items()},
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Takes up what ``get_extra_state`` gave."""
        self.waiting = {int(n): list(states) for n, states in state["waiting"].items()}
        self.arriving = {int(n): gradient for n, gradient in state["arriving"].items()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LateCredit":
        self.waiting, self.arriving = map_tensors(fn, (self.waiting, self.arriving))
        return super()._apply(fn, recurse)
