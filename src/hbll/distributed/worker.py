"""Workers: a stage in a process of its own.

    torch.distributed.init_process_group("gloo")
    rule = hbll.make_rule("stream", network, stage=(3, 4), copies=True)        # the same in every process
    worker = Worker(rule)
    optimizer = torch.optim.AdamW(worker.parameters(), lr=1e-3)
    for x, y in batches:                                                       # which the first stage alone reads
        optimizer.zero_grad()
        worker.backward(x, y)
        optimizer.step()
    worker.finish()

Every stage works on the batch that the one before it has handed on; nobody waits for a later one. Stage n's k-th step is
what it does in the rule's step k + n - 1 in one process, to the last bit.
"""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from hbll.distributed.link import Receiver, Sender, lost
from hbll.distributed.share import Share
from hbll.rule import Message, Rule, Step
from hbll.rules.readouts import Meet, Meeting, load_vector, mean, vector
from hbll.rules.stream import Stream

__all__ = ["Worker"]


class Worker(Share):
    """This process's stage of a rule, and its links to the stages before and after.

    Other stages' modules give their memory back: they are on the device ``meta`` until ``gather``.

    Args:
        rule: the rule, made alike in every process and on this process's device.
        mesh: the processes, by ``stage`` and ``data``: replicas of a stage average their gradients. By default as many
            replicas of every stage as there are processes.
        wire: precision of floating point states on the links; None: their own.
        in_flight: messages that may be under way on a link.

    Raises:
        ValueError: the rule's stages are not local, two of them share a weight, or there are other processes than stages.
    """

    def __init__(
        self, rule: Rule, mesh: DeviceMesh | None = None, *, wire: torch.dtype | None = None, in_flight: int = 2
    ) -> None:
        rule.check_apart()
        super().__init__(rule, mesh, [(n,) for n in range(1, len(rule.stages) + 1)])
        (self.stage,) = self.stages
        self.last = len(rule.stages)
        self._clock = 0  # steps of the rule in one process, those in which it is drained among them
        self._drained = 0  # when the last epoch had ended
        self._refreshed = 0
        self._next: Sender | None = None
        self._before: Receiver | None = None
        for n, replica, pair in _pairs(self.mesh):
            group = dist.new_group(pair)
            if replica == self.replica and n == self.stage:
                self._next = Sender(pair[1], f"stage {n + 1}", group, self.on_wire, wire, in_flight)
            if replica == self.replica and n + 1 == self.stage:
                self._before = Receiver(pair[0], f"stage {n}", group, self.on_wire, self.device, in_flight)

    @property
    def bytes_sent(self) -> int:
        """Bytes handed to the next stage so far."""
        return self._next.bytes if self._next else 0

    def backward(self, x: Any = None, y: Any = None, scale: Tensor | float = 1.0, *, average: bool = True) -> Step:
        """A training step, whose gradients are added to ``.grad`` and averaged over the replicas of the stage.

        Args:
            x, y: a batch, of which the first stage learns; the others take what the stage before has handed on.
            scale: what gradients are multiplied by.
            average: whether the gradients in ``.grad``, those of earlier micro-batches among them, are then averaged: once,
                after the last one of a step, is enough.

        Raises:
            ConnectionError: another stage is lost.
        """
        self._refresh(self._clock + self.stage - 1)
        given = self._before.get() if self._before else Message(x, y, {})
        step = self.rule.stage_backward(self.stage, given, self._hand_on, scale)
        if average:
            self._average()
        self._clock += 1
        return step

    @torch.no_grad()
    def predict(self, x: Any = None, y: Any = None) -> tuple[Any, Any] | None:
        """The head's output of a batch and its labels, at the last stage; the others evaluate their stage and return None.

        Args: as of ``backward``. No larger than the first batch that was learned from.

        Raises:
            ConnectionError: another stage is lost.
        """
        if self._before:
            given = self._before.get()
        else:
            state, context = self.rule.network.embedded(x)
            given = Message(state, y, context)
        state = self.rule.stages[self.stage - 1](given.state, **given.context)
        if self.stage == self.last:
            return self.rule.network.read(state, given.context), given.labels
        self._hand_on(Message(state, given.labels, given.context))
        return None

    def drain(self) -> None:
        """Ends an epoch with no batch in flight: refreshes what would be while the last one passes the later stages. Does
        nothing more when it is called again."""
        if self._clock > self._drained:
            super().drain()
            self._refresh(self._clock + self.last - 2)
            self._clock += self.last - 1
            self._drained = self._clock

    def carry(self) -> dict[str, Any]:
        return {"clock": self._clock}

    def load_carry(self, state: Mapping[str, Any]) -> None:
        self._clock = self._drained = state["clock"]
        self._refreshed = max(0, self._clock - 1)

    def close(self) -> None:
        for link in (self._before, self._next):
            if link is not None:
                link.close()

    def _hand_on(self, message: Message) -> None:
        assert self._next is not None
        self._next.put(message)

    def _refresh(self, time: int) -> None:
        """Lets copies and originals meet that are to by the time of a step, which are those of the rule in one process."""
        if not isinstance(self.rule, Stream) or not self.rule.refresh:
            return
        for _ in range(self._refreshed // self.rule.refresh, time // self.rule.refresh):
            for meeting in self.rule.meetings():
                with lost("a stage whose copies are refreshed with this one's"):
                    self._meet(meeting, self.rule.meet)
        self._refreshed = time

    def _meet(self, meeting: Meeting, how: Meet) -> None:
        """This stage's part in a meeting, whose mean is made where the original is."""
        owner, both = self._ranks[meeting.owner - 1], how == "mean"
        if self.stage in meeting.copies:
            values = vector(meeting.copies[self.stage])
            if both:
                dist.send(values, owner, group=self._shares)
            dist.recv(values, owner, group=self._shares)
            load_vector(meeting.copies[self.stage], values)
        elif self.stage == meeting.owner:
            agreed = vector(meeting.original)
            ranks = [self._ranks[n - 1] for n in meeting.copies]
            if both:
                copies = [torch.empty_like(agreed) for _ in ranks]
                for values, rank in zip(copies, ranks, strict=True):
                    dist.recv(values, rank, group=self._shares)
                agreed = mean(copies, agreed)
                load_vector(meeting.original, agreed)
            for rank in ranks:
                dist.send(agreed, rank, group=self._shares)


def _pairs(mesh: DeviceMesh) -> Iterator[tuple[int, int, list[int]]]:
    """Stage, replica and the ranks of every link, in the order in which all processes make them."""
    for replica, ranks in enumerate(mesh.mesh.T.tolist()):
        for n, pair in enumerate(pairwise(ranks), 1):
            yield n, replica, list(pair)
