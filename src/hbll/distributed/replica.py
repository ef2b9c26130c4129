"""Replicas: the whole rule in every process, each of which learns from its share of every batch.

torch.distributed.init_process_group("gloo")
rule = hbll.make_rule("paper", network)                                    # any rule, the same in every process
worker = Replica(rule)
optimizer = torch.optim.AdamW(worker.parameters(), lr=1e-3)
for x, y in shares:                                                        # of one size in all processes
    optimizer.zero_grad()
    worker.backward(x, y)
    optimizer.step()
worker.drain()                                                             # at an epoch's end: running statistics are one's
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hbll.calls import refuse_in_place
from hbll.distributed.link import lost
from hbll.distributed.share import take_over
from hbll.rule import Rule, Step

__all__ = ["Replica"]


class Replica:
    """This process's copy of a rule in DistributedDataParallel, which is used as a ``Worker`` is.

    Args:
        rule: the rule, made alike in every process.
    """

    def __init__(self, rule: Rule) -> None:
        with lost("another replica"), warnings.catch_warnings():
            # The name that comes in its place is not known to all versions, and means something else.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            # Rules leave some parameters out in some steps; running statistics stay each one's until an epoch ends.
            self._averaging = DistributedDataParallel(rule, find_unused_parameters=True, broadcast_buffers=False)
        self.rule = rule
        self.module: nn.Module = rule

    def parameters(self) -> Iterator[nn.Parameter]:
        """The rule's."""
        return self.rule.parameters()

    def backward(self, x: Any = None, y: Any = None, scale: Tensor | float = 1.0, *, average: bool = True) -> Step:
        """A training step on a share of a batch, whose gradients are added to ``.grad`` and averaged over all processes.

        Args:
            x, y, scale: as of ``Rule.backward``.
            average: whether the gradients in ``.grad``, those of earlier micro-batches among them, are then averaged: once,
                after the last one of a step, is enough.

        Raises:
            ConnectionError: another process is lost.
        """
        with nullcontext() if average else self._averaging.no_sync():
            step = self._averaging(x, y)
            with lost("another replica"):
                try:
                    (step.loss * scale).backward()
                except RuntimeError as error:  # of this process's own
                    refuse_in_place("a block or the head", error)
                    raise
        return step

    @torch.no_grad()
    def predict(self, x: Any = None, y: Any = None) -> tuple[Any, Any]:
        """The head's output of a batch, and its labels."""
        return self.rule.network(x), y

    def carry(self) -> dict[str, Any]:
        """What this process keeps from step to step."""
        return self.rule.carry()

    def load_carry(self, state: Mapping[str, Any]) -> None:
        """Takes up what ``carry`` gave."""
        self.rule.load_carry(state)

    def drain(self) -> None:
        """Ends an epoch: replicas have the running statistics of the first then. What is in flight goes on with the next
        batch."""
        with lost("another replica"):
            take_over(self.rule, 0, None)

    def close(self) -> None:
        """Nothing: there are no links."""

    def gather(self) -> None:
        """Nothing: every process has all modules."""
