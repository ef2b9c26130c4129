"""The asynchronous pipeline, the rival of ``stream`` at equal throughput: exact gradients, but late.

Stages work on successive mini-batches as in ``stream``, but the gradient of a mini-batch travels back one stage a step, so
that stage n of S learns from it 2 (S - n) steps after it passed (PipeDream, Harlap et al., arXiv 1806.03377). Every
stage's input, the last one's too, is kept and evaluated again with the weights of the day, which no stash of old weights
is needed for (as with activation recomputation in PipeMare, Yang et al., arXiv 1910.05124).
"""

import torch
from torch import Tensor

from hbll.credit import Credit, train_head
from hbll.kept import Kept, map_tensors, own_copy
from hbll.rule import Rule
from hbll.trace import Trace, attach_gradients

__all__ = ["LateCredit"]


class LateCredit(Credit):
    """Gradients that arrive from the stage after one step later than that stage had them."""

    def __init__(self, rule: Rule) -> None:
        super().__init__(rule)
        self.flight = Kept()
        """``waiting``: inputs whose gradients are still to come, oldest first, by stage; 0 is the embed.
        ``arriving``: gradients at the outputs of the oldest of them, by stage."""

    def finish(self, trace: Trace) -> None:
        if not self.training:
            raise ValueError(
                "an asynchronous pipeline has no gradients of the batch at hand to look at: measure network(x) instead, or "
                "another rule"
            )
        flight = self.flight.of(trace) or {"waiting": {}, "arriving": {}}
        waiting, arriving = flight["waiting"], flight["arriving"]
        waiting.setdefault(0, []).append(own_copy(trace.x))
        for wave in trace.waves:
            for n, state in zip(wave.nodes, wave.inputs.detach().unbind(0), strict=True):
                waiting.setdefault(n, []).append(state)
        handed_on: dict[int, Tensor] = {}
        last = trace.stages.nodes[-1]
        if any(last in wave.nodes for wave in trace.waves):
            labels = map_tensors(lambda label: label[last - 1], trace.labels)
            _, arriving[last] = train_head(trace, last, trace.outputs((last,))[0], labels)
        if not arriving:  # the pipeline still fills: a step that moves nothing
            embedded = trace.boundary[0]
            trained = (p for p in trace.network.parameters() if p.requires_grad)
            leaf = embedded if embedded.requires_grad else next(trained, embedded)
            nothing = attach_gradients(embedded.new_zeros(()), [leaf], [torch.zeros_like(leaf)])
            trace.terms.append(("embed", nothing))
        # Nothing that arrives in this step depends on another arrival: all stages could do this at once.
        for n, gradient in arriving.items():
            state = waiting[n].pop(0)
            if n == 0:
                embedded = trace.network.embed(state)
                trace.terms.append(("embed", attach_gradients(gradient.new_zeros(()), [embedded], [gradient])))
                continue
            state = state.detach().requires_grad_()
            evaluation = trace.engine((n,), state.unsqueeze(0))
            at_input, *for_parameters = torch.autograd.grad(
                evaluation.outputs, [state, *evaluation.parameters], gradient.unsqueeze(0), materialize_grads=True
            )
            handed_on[n - 1] = at_input
            term = attach_gradients(gradient.new_zeros(()), evaluation.parameters, for_parameters)
            trace.terms.append(((n,), term))
            blocks = trace.stages.size([n])
            # The last stage's gradient is there when its output is, the others' since the step before.
            trace.count(blocks, blocks)
            trace.count(2 * blocks, 2 * blocks)
        self.flight.leave(trace, {"waiting": waiting, "arriving": handed_on})
