"""The chain's own states, one stage after the other, as deployed."""

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from hbll.carry import map_tensors
from hbll.rule import Step
from hbll.rules.composed import Batch, Cut, Front, States, Targets

__all__ = ["ChainStates"]


class ChainStates(States):
    """One stage after the other: exact, and as many sequential evaluations as there are blocks. States may change shape.

    Args:
        carry_gradient: whether what a stage hands on carries its graph; else every stage learns by itself, and is done with
            before the next is evaluated.
        teach_context: whether what the embed computes of the context by trained weights learns from all stages, or from the
            first one alone, as where the others work on earlier batches.
    """

    def __init__(self, carry_gradient: bool = False, teach_context: bool = True) -> None:
        super().__init__()
        self.graphs_meet = carry_gradient
        self.teach_context = teach_context

    def fronts(self, cut: Cut, batch: Batch | None, targets: Targets, step: Step) -> Iterator[Front]:
        assert batch is not None  # nothing is ever in flight
        state, depth = batch.state, 0
        for n in cut.nodes:
            parents = (n - 1,) if self.graphs_meet else ()
            front = cut.front((n,), parents, state.unsqueeze(0), [batch], depth, step)
            state, depth = (front.evaluation.outputs if self.graphs_meet else front.outputs)[0], front.depth
            yield front
            del front
            if n == 1 and not self.teach_context:
                batch = replace(batch, context=map_tensors(Tensor.detach, dict(batch.context)))
