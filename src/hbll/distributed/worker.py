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

from collections.abc import Iterator
from itertools import chain, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from hbll.distributed.link import Receiver, Sender, lost
from hbll.network import Context
from hbll.rule import Message, Rule, Step
from hbll.rules.readouts import Meet, Meeting, load_vector, mean, vector
from hbll.rules.stream import Stream

__all__ = ["Worker"]


class Worker:
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
        stages, processes = len(rule.stages), dist.get_world_size()
        device = next(rule.parameters()).device
        if mesh is None:
            if processes % stages:
                raise ValueError(
                    f"the rule has {stages} stages, and there are {processes} processes: start {stages}, or a multiple"
                )
            mesh = init_device_mesh(device.type, (stages, processes // stages), mesh_dim_names=("stage", "data"))
        if mesh.mesh.shape[0] != stages:
            raise ValueError(f"the mesh is of {mesh.mesh.shape[0]} stages, and the rule has {stages}")
        self.rule = rule
        self.device = device
        self.stage, self.replica = mesh.get_local_rank("stage") + 1, mesh.get_local_rank("data")
        self.last = stages
        self.steps = 0
        """Batches that the stage has learned from."""
        self.module = nn.ModuleList(rule.own(self.stage))
        """What the stage owns."""
        _let_go(rule, self.stage)
        self._ranks: list[int] = mesh.mesh[:, self.replica].tolist()
        self._data = mesh.get_group("data") if mesh.mesh.shape[1] > 1 else None
        self._meeting = mesh.get_group("stage")
        self._refreshed = 0
        on_wire = device if dist.get_backend() == "nccl" else torch.device("cpu")
        self._next: Sender | None = None
        self._before: Receiver | None = None
        for n, replica, pair in _pairs(mesh):
            group = dist.new_group(pair)
            if replica == self.replica and n == self.stage:
                self._next = Sender(pair[1], f"stage {n + 1}", group, on_wire, wire, in_flight)
            if replica == self.replica and n + 1 == self.stage:
                self._before = Receiver(pair[0], f"stage {n}", group, on_wire, device, in_flight)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The stage's own."""
        return self.module.parameters()

    @property
    def bytes_sent(self) -> int:
        """Bytes handed to the next stage so far."""
        return self._next.bytes if self._next else 0

    def backward(self, x: Any = None, y: Any = None, scale: Tensor | float = 1.0) -> Step:
        """A training step, whose gradients are added to ``.grad`` and averaged over the replicas of the stage.

        Args:
            x, y: a batch, of which the first stage learns; the others take what the stage before has handed on.
            scale: what gradients are multiplied by.

        Raises:
            ConnectionError: another stage is lost.
        """
        self._refresh(self.steps + self.stage - 1)
        given = self._before.get() if self._before else Message(x, y, {})
        step = self.rule.stage_backward(self.stage, given, self._hand_on, scale)
        self._average()
        self.steps += 1
        return step

    @torch.no_grad()
    def predict(self, x: Any = None, y: Any = None) -> tuple[Any, Any] | None:
        """The head's output of a batch and its labels, at the last stage; the others evaluate their stage and return None.

        Args: as of ``backward``. No larger than the first batch that was learned from.
        """
        state, labels, context = self._entered(x, y) if self.stage == 1 else self._arrived()
        state = self.rule.stages[self.stage - 1](state, **context)
        if self.stage == self.last:
            return self.rule.network.read(state, context), labels
        self._hand_on(Message(state, labels, context))
        return None

    def finish(self) -> None:
        """Ends the training: what would be refreshed while the last batch passes the later stages, and the links."""
        self._refresh(self.steps + self.last - 2)
        for link in (self._before, self._next):
            if link is not None:
                link.close()

    def gather(self) -> None:
        """Puts the stages together in the process of rank 0, whose rule then has all modules with their weights."""
        if self.replica:
            return
        for n, rank in enumerate(self._ranks, 1):
            if n == 1:
                continue
            module = nn.ModuleList(self.rule.own(n))
            if self.stage == 1:
                module.to_empty(device=self.device)
            if self.stage in (1, n):
                with lost(f"stage {n}" if self.stage == 1 else "stage 1"):
                    for tensor in module.state_dict().values():
                        if self.stage == 1:
                            dist.recv(tensor, rank, group=self._meeting)
                        else:
                            dist.send(tensor.contiguous(), self._ranks[0], group=self._meeting)

    def _entered(self, x: Any, y: Any) -> tuple[Tensor, Any, Context]:
        state, context = self.rule.network.embedded(x)
        return state, y, context

    def _arrived(self) -> tuple[Tensor, Any, Context]:
        assert self._before is not None
        message = self._before.get()
        return message.state, message.labels, message.context

    def _hand_on(self, message: Message) -> None:
        assert self._next is not None
        self._next.put(message)

    def _average(self) -> None:
        """Makes gradients the mean over the stage's replicas."""
        if self._data is None:
            return
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        together = torch.cat([gradient.flatten() for gradient in gradients])
        with lost("a replica of this stage"):
            dist.all_reduce(together, group=self._data)
        together /= dist.get_world_size(self._data)
        for gradient, part in zip(gradients, together.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

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
                dist.send(values, owner, group=self._meeting)
            dist.recv(values, owner, group=self._meeting)
            load_vector(meeting.copies[self.stage], values)
        elif self.stage == meeting.owner:
            agreed = vector(meeting.original)
            ranks = [self._ranks[n - 1] for n in meeting.copies]
            if both:
                copies = [torch.empty_like(agreed) for _ in ranks]
                for values, rank in zip(copies, ranks, strict=True):
                    dist.recv(values, rank, group=self._meeting)
                agreed = mean(copies, agreed)
                load_vector(meeting.original, agreed)
            for rank in ranks:
                dist.send(agreed, rank, group=self._meeting)


def _pairs(mesh: DeviceMesh) -> Iterator[tuple[int, int, list[int]]]:
    """Stage, replica and the ranks of every link, in the order in which all processes make them."""
    for replica, ranks in enumerate(mesh.mesh.T.tolist()):
        for n, pair in enumerate(pairwise(ranks), 1):
            yield n, replica, list(pair)


def _let_go(rule: Rule, stage: int) -> None:
    """Gives back the memory of other stages' modules."""
    own = {id(t) for module in rule.own(stage) for t in chain(module.parameters(), module.buffers())}
    others = [(n, module) for n in range(1, len(rule.stages) + 1) if n != stage for module in rule.own(n)]
    for n, module in others:
        if any(id(tensor) in own for tensor in chain(module.parameters(), module.buffers())):
            first, second = sorted((n, stage))
            raise ValueError(f"stages {first} and {second} share a weight: untie them, or put both into one stage")
    for _, module in others:
        module.to(device="meta")
