"""Links: one-way connections over which a stage hands its messages to the next one, in another process; and exchanges, in
which several processes pass several messages at once.

A message is one buffer of a size that the first one sets: what is in it (shapes, types, whatever is no tensor), then its
tensors. Both ends of a link have a few such buffers: the receiver has asked for a message before it comes, so that a slow
link's delay is paid once, and the sender waits when the receiver is that many messages behind.
"""

import pickle
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree

from hbll.rule import Message

__all__ = ["Crossing", "Exchange", "Receiver", "Sender"]

_ALIGNMENT = 16
_LENGTH = struct.Struct("<q")


class Sender:
    """The end of a link that a stage puts messages into.

    Args:
        to: rank of the other end.
        title: what errors call the other end.
        group: a process group of the two.
        device: where messages lie while they are sent.
        wire: precision of floating point states and contexts on the way; None: their own.
        in_flight: how many messages may be under way.
    """

    def __init__(
        self,
        to: int,
        title: str,
        group: Any,
        device: torch.device,
        wire: torch.dtype | None = None,
        in_flight: int = 2,
    ) -> None:
        self.to, self.title, self.group, self.device = to, title, group, device
        self.wire = wire
        self.in_flight = in_flight
        self.bytes = 0
        """Bytes put into the link so far."""
        self._buffers: list[Tensor] = []
        self._works: list[Any] = []
        self._announced: Any = None  # given up, it would not be sent
        self._count = 0

    def put(self, message: Message) -> None:
        """Sends a message, once there is a buffer free for it.

        Raises:
            ValueError: it is larger than the first one's buffer.
            ConnectionError: the other end is lost.
        """
        form, tensors = _packed(message, self.wire)
        if not self._buffers:
            self._open(_room(form, tensors))
        self._send(form, tensors)

    def close(self) -> None:
        """Answers what the other end has asked for, and waits until it has all."""
        if self._buffers:
            for _ in range(self.in_flight):
                self._send(b"", [])
            with lost(self.title):
                for work in self._works:
                    if work is not None:
                        work.wait()

    def _open(self, size: int) -> None:
        with lost(self.title):  # without waiting: the other end may wait for this stage first, to refresh copies
            self._announced = dist.isend(torch.tensor([size], device=self.device), self.to, group=self.group)
        self._buffers = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(self.in_flight)]
        self._works = [None] * self.in_flight

    def _send(self, form: bytes, tensors: list[Tensor]) -> None:
        room = len(self._buffers[0])
        _check_room(_size(len(form), tensors), room, self.title)
        place = self._count % self.in_flight
        buffer, work = self._buffers[place], self._works[place]
        with lost(self.title):
            if work is not None:
                work.wait()
            _write(buffer, form, tensors)
            self._works[place] = dist.isend(buffer, self.to, group=self.group)
        self._count += 1
        self.bytes += room


class Receiver:
    """The end of a link that a stage gets messages from.

    Args:
        source: rank of the other end.
        title: what errors call the other end.
        group, device, in_flight: as of ``Sender``.
        onto: where messages are wanted.
    """

    def __init__(
        self,
        source: int,
        title: str,
        group: Any,
        device: torch.device,
        onto: torch.device,
        in_flight: int = 2,
    ) -> None:
        self.source, self.title, self.group, self.device, self.onto = source, title, group, device, onto
        self.in_flight = in_flight
        self._buffers: list[Tensor] = []
        self._works: list[Any] = []
        self._count = 0

    def get(self) -> Message:
        """The next message, once it is there.

        Raises:
            ConnectionError: the other end is lost.
        """
        if not self._buffers:
            self._open()
        place = self._count % self.in_flight
        with lost(self.title):
            self._works[place].wait()
            message = _read(self._buffers[place], self.onto)
            self._works[place] = self._ask(place)
        self._count += 1
        return message

    def close(self) -> None:
        """Takes the answers to what was asked for and is not needed."""
        with lost(self.title):
            for work in self._works:
                work.wait()

    def _open(self) -> None:
        size = torch.zeros(1, dtype=torch.int64, device=self.device)
        with lost(self.title):
            dist.recv(size, self.source, group=self.group)
            room = int(size)
            self._buffers = [torch.empty(room, dtype=torch.uint8, device=self.device) for _ in range(self.in_flight)]
            self._works = [self._ask(place) for place in range(self.in_flight)]

    def _ask(self, place: int) -> Any:
        return dist.irecv(self._buffers[place], self.source, group=self.group)


class Crossing(NamedTuple):
    """A message that goes from one process to another in every step."""

    what: str
    node: int
    """Of which node of a tree."""
    source: int
    to: int
    """Numbers of processes, from 0."""


class Exchange:
    """Messages among several processes, all that cross at a time at once.

    Args:
        place: this process's number, from 0.
        ranks: of all processes.
        titles: what errors call them.
        group: a process group of all.
        device: where messages lie while they are sent.
        onto: where they are wanted.
        wire: as of ``Sender``.
    """

    def __init__(
        self,
        place: int,
        ranks: Sequence[int],
        titles: Sequence[str],
        group: Any,
        device: torch.device,
        onto: torch.device,
        wire: torch.dtype | None = None,
    ) -> None:
        self.place, self.ranks, self.titles, self.group = place, ranks, titles, group
        self.device, self.onto, self.wire = device, onto, wire
        self.messages = 0
        self.bytes = 0
        """Sent so far."""
        self._buffers: dict[Crossing, Tensor] = {}

    def __call__(
        self, crossings: Sequence[Crossing], message: Callable[[Crossing], Message]
    ) -> dict[Crossing, Message]:
        """Sends what of these crossings starts here, and returns what ends here, once all of it is there.

        Args:
            crossings: those of a moment, in one order everywhere; others' are passed over.
            message: what a crossing that starts here carries.

        Raises:
            ValueError: a message is larger than the first of its crossing.
            ConnectionError: another process is lost.
        """
        mine = [c for c in crossings if self.place in (c.source, c.to)]
        packed = {c: _packed(message(c), self.wire) for c in mine if c.source == self.place}
        if new := [c for c in mine if c not in self._buffers]:
            rooms = {c: _room(*packed[c]) if c in packed else 0 for c in new}
            sizes = {c: torch.tensor([room], device=self.device) for c, room in rooms.items()}
            self._pass(sizes)
            for c, size in sizes.items():
                self._buffers[c] = torch.empty(int(size), dtype=torch.uint8, device=self.device)
        for c, (form, tensors) in packed.items():
            _check_room(_size(len(form), tensors), len(self._buffers[c]), self.titles[c.to])
            _write(self._buffers[c], form, tensors)
            self.messages += 1
            self.bytes += len(self._buffers[c])
        self._pass({c: self._buffers[c] for c in mine})
        return {c: _read(self._buffers[c], self.onto) for c in mine if c.to == self.place}

    def _pass(self, tensors: Mapping[Crossing, Tensor]) -> None:
        """Sends the tensors of crossings that start here, and fills those of the others."""
        sent = [c.source == self.place for c in tensors]
        others = [c.to if own else c.source for c, own in zip(tensors, sent, strict=True)]
        operations = [
            dist.P2POp(dist.isend if own else dist.irecv, tensor, self.ranks[other], self.group)
            for tensor, own, other in zip(tensors.values(), sent, others, strict=True)
        ]
        with lost(" or ".join(self.titles[other] for other in sorted(set(others)))):
            for work in dist.batch_isend_irecv(operations) if operations else ():
                work.wait()


@contextmanager
def lost(title: str) -> Iterator[None]:
    """Inside, another process is waited for.

    Raises:
        ConnectionError: it ended, or did not answer in the process group's time.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0].split(". This is typically")[0]
        raise ConnectionError(f"{title} ended, or did not answer in time ({reason})") from error


@dataclass(frozen=True)
class _Piece:
    """Stands for a tensor in a message's form."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    sent: torch.dtype


def _packed(message: Message, wire: torch.dtype | None) -> tuple[bytes, list[Tensor]]:
    """The form of a message and its tensors as they are sent."""
    tensors: list[Tensor] = []

    def piece(tensor: Tensor, lower: torch.dtype | None) -> _Piece:
        sent = tensor.detach()
        if lower is not None and tensor.is_floating_point():
            sent = sent.to(lower)
        tensors.append(sent.contiguous())
        return _Piece(tuple(tensor.shape), tensor.dtype, sent.dtype)

    state, context = _pytree.tree_map_only(
        Tensor, lambda tensor: piece(tensor, wire), (message.state, dict(message.context))
    )
    labels = _pytree.tree_map_only(Tensor, lambda tensor: piece(tensor, None), message.labels)
    return pickle.dumps((state, context, labels)), tensors


def _size(form: int, tensors: list[Tensor]) -> int:
    return _aligned(_LENGTH.size + form) + sum(_aligned(tensor.nbytes) for tensor in tensors)


def _room(form: bytes, tensors: list[Tensor]) -> int:
    """The size of a buffer for this message, and others like it."""
    return _size(len(form) + 256, tensors)  # the same form may take a few bytes more for larger numbers


def _check_room(size: int, room: int, title: str) -> None:
    """Raises ValueError unless a message fits its buffer."""
    if size > room:
        raise ValueError(
            f"what is handed to {title} takes {size:,} bytes, and the first message, by which the link was sized, "
            f"{room:,}: let the largest batch come first"
        )


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


def _write(buffer: Tensor, form: bytes, tensors: list[Tensor]) -> None:
    start = _LENGTH.pack(len(form)) + form
    buffer[: len(start)].copy_(torch.frombuffer(bytearray(start), dtype=torch.uint8))
    offset = _aligned(len(start))
    for tensor in tensors:
        if tensor.numel():
            buffer[offset : offset + tensor.nbytes].copy_(tensor.view(-1).view(torch.uint8))
        offset = _aligned(offset + tensor.nbytes)


def _read(buffer: Tensor, onto: torch.device) -> Message:
    (length,) = _LENGTH.unpack(bytes(buffer[: _LENGTH.size].tolist()))
    form = bytes(buffer[_LENGTH.size : _LENGTH.size + length].cpu().numpy())
    offset = _aligned(_LENGTH.size + length)

    def tensor(piece: _Piece) -> Tensor:
        nonlocal offset
        found = torch.empty(piece.shape, dtype=piece.sent, device=onto)
        if found.numel():
            found.view(-1).view(torch.uint8).copy_(buffer[offset : offset + found.nbytes])
        offset = _aligned(offset + found.nbytes)
        return found.to(piece.dtype)

    state, context, labels = _pytree.tree_map_only(_Piece, tensor, pickle.loads(form))
    return Message(state, labels, context)
