"""The asynchronous pipeline without older weights, the weakest of its kind: exact gradients, but late.

Stages work on successive mini-batches as in ``stream``, but the gradient of a mini-batch travels back one stage a step, so
that stage n of S learns from it 2 (S - n) steps after it passed (PipeDream, Harlap et al., arXiv 1806.03377). Every
stage's input, the last one's too, is kept and evaluated again with the weights of the day, which no stash of old weights
is needed for (as with activation recomputation in PipeMare, Yang et al., arXiv 1910.05124).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hbll.carry import Carry, own_copy
from hbll.losses import Loss, cross_entropy, wide
from hbll.modes import still_statistics, tracking_norms
from hbll.network import Chain
from hbll.rule import StageLoss, Step, attach_gradients
from hbll.rules.composed import Batch, Composed, Credit, Cut, EngineChoice, Front, Targets, train_head
from hbll.rules.stream import StreamStates

__all__ = ["LateCredit", "Pipeline"]


class LateCredit(Credit):
    """Gradients that arrive from the stage after one step later than that stage had them.

    Args:
        loss: the label's loss.
    """

    takes_pipelined = True

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.loss = loss
        self.flight = Carry()
        """``waiting``: inputs whose gradients are still to come, oldest first, by stage; 0 is the embed.
        ``arriving``: gradients at the outputs of the oldest of them, by stage."""

    def losses(self, fronts: Iterator[Front], cut: Cut, targets: Targets, step: Step) -> Iterator[StageLoss]:
        if not self.training:
            raise ValueError(
                "an asynchronous pipeline has no gradients of the batch at hand to look at: measure network(x) instead, or "
                "another rule"
            )
        kept = self.flight.on(cut.device) or {"waiting": {}, "arriving": {}}
        waiting: dict[int, list[Any]] = kept["waiting"]
        arriving: dict[int, Tensor] = kept["arriving"]
        at_head: tuple[Tensor, Batch] | None = None
        for front in fronts:
            for n, state, batch in zip(front.stages, front.inputs.detach().unbind(0), front.batches, strict=True):
                if n == 1 and batch.context_leaves:
                    raise ValueError(
                        "the context is computed by weights that are trained, which an asynchronous pipeline gives no "
                        "credit: let embed return it detached"
                    )
                if n == 1:
                    waiting.setdefault(0, []).append(own_copy(batch.x))
                # Of the first stage it may be what the loader gave, whose buffers it may use again.
                own = own_copy(state) if n == 1 else state
                waiting.setdefault(n, []).append({"state": own, "context": own_copy(dict(batch.context))})
            if front.stages[-1] == cut.last:
                at_head = front.outputs[-1], front.batches[-1]
        if at_head is not None:
            loss, arriving[cut.last] = train_head(self.loss, cut, *at_head, step)
            yield loss
        handed_on: dict[int, Tensor] = {}
        # Nothing that arrives in this step depends on another arrival: all stages could do this at once.
        for n, gradient in arriving.items():
            if n == 0:
                with still_statistics(tracking_norms(cut.network.embed)):  # which has seen the batch
                    embedded, _ = cut.network.embedded(waiting[0].pop(0))
                if embedded.requires_grad:
                    yield StageLoss("embed", attach_gradients(gradient.new_zeros(()), [embedded], [gradient]))
                continue
            left = waiting[n].pop(0)
            state = left["state"].requires_grad_()
            with still_statistics(cut.norms):
                outputs = cut.engine((n,), state.unsqueeze(0), [left["context"]]).outputs
            moved = attach_gradients(wide(gradient).new_zeros(()), [outputs], [gradient.unsqueeze(0)])
            yield StageLoss(n, moved, leaves=(state,))
            handed_on[n - 1] = torch.zeros_like(state) if state.grad is None else step.unscaled(state.grad)
            del outputs, moved, state
            blocks = cut.size([n])
            # The last stage's gradient is there when its output is, the others' since the step before.
            step.count(blocks, blocks)
            step.count(2 * blocks, 2 * blocks)
        self.flight.leave({"waiting": waiting, "arriving": handed_on})

    @property
    def in_flight(self) -> bool:
        return bool(self.flight.nest) and any(self.flight.nest["waiting"].values())

    def carries(self) -> Mapping[str, Carry]:
        return {"late": self.flight}


class Pipeline(Composed):
    """The asynchronous pipeline.

    Args:
        network: the network to train; states may change shape.
        stage, rim, loss, engine: as of ``Composed``.
    """

    late = True

    def __init__(
        self,
        network: Chain,
        *,
        stage: int | Sequence[int] = 1,
        rim: float = 0.0,
        loss: Loss = cross_entropy,
        engine: EngineChoice = "auto",
    ) -> None:
        super().__init__(
            network,
            StreamStates(with_graph=False),
            LateCredit(loss),
            stage=stage,
            rim=rim,
            loss=loss,
            engine=engine,
        )
