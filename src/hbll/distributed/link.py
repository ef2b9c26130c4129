"""Links: one-way connections over which a stage hands its messages to the next one, in another process.

A message is one buffer of a size that the first one sets: what is in it (shapes, types, whatever is no tensor), then its
tensors. Both ends have a few such buffers: the receiver has asked for a message before it comes, so that a slow link's delay
is paid once, and the sender waits when the receiver is that many messages behind.
"""

import pickle
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree

from hbll.rule import Message

__all__ = ["Receiver", "Sender"]

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
            self._open(_size(len(form) + 256, tensors))  # the same form may take a few bytes more for larger numbers
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
        size, room = _size(len(form), tensors), len(self._buffers[0])
        if size > room:
            raise ValueError(
                f"what is handed to {self.title} takes {size:,} bytes, and the first message, by which the link was sized, "
                f"{room:,}: let the largest batch come first"
            )
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


@contextmanager
def lost(title: str) -> Iterator[None]:
    """Inside, another process is waited for.

    Raises:
        ConnectionError: it ended, or did not answer in the process group's time.
    """
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
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
