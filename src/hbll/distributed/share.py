"""What workers have in common: a process owns some stages of a rule, and may have replicas."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from hbll.distributed.link import lost
from hbll.rule import Rule

__all__ = ["Share", "average", "modules_of", "take_over"]


class Share:
    """This process's consecutive stages of a rule, in a mesh of processes.

    Other processes' modules give their memory back: they are on the device ``meta`` until ``gather``.

    Args:
        rule: the rule, made alike in every process and on this process's device.
        mesh: the processes, by ``stage`` and ``data``: replicas average their gradients. By default as many replicas of
            every share as there are processes.
        owned: the stages of each share, from 1 to S, one after the other.

    Raises:
        ValueError: two shares have a weight in common, or there are other processes than shares.
    """

    def __init__(self, rule: Rule, mesh: DeviceMesh | None, owned: Sequence[tuple[int, ...]]) -> None:
        shares, processes = len(owned), dist.get_world_size()
        device = next(rule.parameters()).device
        if mesh is None:
            if processes % shares:
                raise ValueError(
                    f"the rule's stages are for {shares} processes, and there are {processes}: start {shares}, or a multiple"
                )
            mesh = init_device_mesh(device.type, (shares, processes // shares), mesh_dim_names=("stage", "data"))
        if mesh.mesh.shape[0] != shares:
            raise ValueError(f"the mesh is of {mesh.mesh.shape[0]} stages, and the rule's are for {shares} processes")
        self.rule = rule
        self.device = device
        self.on_wire = device if dist.get_backend() == "nccl" else torch.device("cpu")
        """Where messages lie while they are sent."""
        self.mesh = mesh
        self.place, self.replica = mesh.get_local_rank("stage"), mesh.get_local_rank("data")
        """Which share this is, from 0, and which replica of it."""
        self.owned = owned
        self.stages = owned[self.place]
        """The stages of this process."""
        self.module = nn.ModuleList(modules_of(rule, self.stages))
        """What the process owns."""
        _let_go(rule, owned, self.place)
        self._ranks: list[int] = mesh.mesh[:, self.replica].tolist()
        self._data = mesh.get_group("data") if mesh.mesh.shape[1] > 1 else None
        self._shares = mesh.get_group("stage")

    def parameters(self) -> Iterator[nn.Parameter]:
        """The process's own."""
        return self.module.parameters()

    def drain(self) -> None:
        """Ends an epoch with no batch in flight; replicas have the running statistics of the first then."""
        if self._data is not None:
            with lost("a replica of this stage"):
                take_over(self.module, int(self.mesh.mesh[self.place, 0]), self._data)

    def carry(self) -> dict[str, Any]:
        """What is kept from one epoch to the next, once the process is drained; the same in all replicas."""
        return {}

    def load_carry(self, state: Mapping[str, Any]) -> None:
        """Takes up what ``carry`` gave."""

    def close(self) -> None:
        """Ends what connects the processes."""

    def finish(self) -> None:
        """Ends the training: ``drain`` and ``close``."""
        self.drain()
        self.close()

    @torch.no_grad()
    def gather(self) -> None:
        """Puts the stages together in the process of rank 0, whose rule then has all modules with their weights and buffers;
        weights that modules of another process share are equal there, and no longer one. ``drain`` comes first: a stage may
        still wait for this one, to let copies and originals meet.

        Raises:
            ConnectionError: another process is lost.
        """
        if self.replica:
            return
        for place, rank in enumerate(self._ranks[1:], 1):
            if self.place not in (0, place):
                continue
            module = nn.ModuleList(modules_of(self.rule, self.owned[place]))
            if self.place == 0:
                module.to_empty(device=self.device)
            with lost(self.title(0 if self.place else place)):
                for tensor in _tensors(module):
                    if self.place == 0:
                        received = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
                        dist.recv(received, rank, group=self._shares)
                        tensor.copy_(received)  # whose memory may be laid out otherwise
                    else:
                        dist.send(tensor.contiguous(), self._ranks[0], group=self._shares)

    def title(self, place: int) -> str:
        """What errors call the process of a share."""
        first, *_, last = (*self.owned[place], self.owned[place][-1])
        return f"stage {first}" if first == last else f"the process of stages {first} to {last}"

    def _average(self) -> None:
        """Makes gradients the mean over the replicas; one that has none, as where no label of its share counts, has 0."""
        if self._data is None:
            return
        trained = [p for p in self.parameters() if p.requires_grad]
        if not trained:
            return
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        some = found[0].new_tensor([p.grad is not None for p in trained])
        with lost("a replica of this stage"):
            average([*found, some], self._data)
        for parameter, gradient, any_has in zip(trained, found, some.tolist(), strict=True):
            parameter.grad = gradient if any_has else None


def average(tensors: Sequence[Tensor], group: dist.ProcessGroup | None) -> None:
    """Makes tensors, in place, their mean over the processes of a group, in one message; all of them have as many."""
    if not tensors:
        return
    together = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(together, group=group)
    together /= dist.get_world_size(group)
    for tensor, part in zip(tensors, together.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


@torch.no_grad()
def take_over(module: nn.Module, first: int, group: dist.ProcessGroup | None) -> None:
    """Gives a module's buffers, which its replicas each move by their own share of a batch, the values of one of them.

    Args:
        first: the rank of that one.
        group: the processes that have replicas; None: all.
    """
    for buffer in module.buffers():
        values = buffer.clone(memory_format=torch.contiguous_format)
        dist.broadcast(values.flatten().view(torch.uint8), first, group=group)  # of which every backend knows how
        if not values.equal(buffer):
            buffer.copy_(values)


def modules_of(rule: Rule, stages: Sequence[int]) -> list[nn.Module]:
    """Everything that belongs to some stages of a rule, in order."""
    return [module for n in stages for module in rule.own(n)]


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, those among them that no state_dict has; shared ones each time."""
    named = (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    return (tensor for _, tensor in chain(*named))


def _let_go(rule: Rule, owned: Sequence[tuple[int, ...]], place: int) -> None:
    """Gives back the memory of other shares' modules.

    Raises:
        ValueError: two shares have a weight in common; in every process.
    """
    owner: dict[int, tuple[int, int]] = {}
    for k, stages in enumerate(owned):
        for n in stages:
            for module in rule.own(n):
                for tensor in chain(module.parameters(), module.buffers()):
                    other, first = owner.setdefault(id(tensor), (k, n))
                    if other != k:
                        raise ValueError(
                            f"stages {first} and {n} share a weight: untie them, or have both in one process"
                        )
    for k, stages in enumerate(owned):
        if k != place:
            for module in modules_of(rule, stages):
                module.to(device="meta")
