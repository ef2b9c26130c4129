"""Roll calls: processes that come one by one, may end before all are there, and may come again.

torch's own way of meeting counts a process that comes twice as two, and takes the store of a first process that has not
noticed a loss yet for a new one. Here the first process listens for as long as it calls, and keeps a connection to each of
the others, the end of which says that the process has ended.
"""

import select
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

from torch.distributed import TCPStore

__all__ = ["roll_call"]

AGAIN = 0.2
"""Seconds after which a process looks again for the first one."""

SIGN = 5.0
"""Seconds after which a process that waits says again that it is there: if the machine of the first one is gone, or has come
back, nothing else would tell."""


def roll_call(rank: int, world: int, host: str, port: int, seconds: float, timeout: timedelta) -> TCPStore:
    """A store for a process group, once all its processes are there at the same time.

    Args:
        rank, world: of this process, and how many there are.
        host, port: where the first process, of rank 0, calls.
        seconds: for which it waits for the others, and they for it.
        timeout: the store's.

    Raises:
        TimeoutError: not all have come.
        OSError: another program listens at the port.
    """
    until = time.monotonic() + seconds
    if rank:
        return TCPStore(host, _called(rank, (host, port), until), world, False, timeout, wait_for_workers=False)
    ipv6 = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if ipv6 else socket.AF_INET
    with (
        socket.create_server(("", port), family=family, dualstack_ipv6=ipv6) as server,
        _all_there(server, world, until) as connections,
    ):
        store = TCPStore(host, 0, world, True, timeout, wait_for_workers=False)
        for connection in connections:
            with suppress(OSError):  # of one that has ended just now, as the group will say
                connection.sendall(store.port.to_bytes(4))
    return store


@contextmanager
def _all_there(server: socket.socket, world: int, until: float) -> Iterator[Iterable[socket.socket]]:
    """Connections, among them one to every other process, which has said its rank."""
    ranks: dict[socket.socket, int | None] = {}
    try:
        while missing := set(range(1, world)).difference(ranks.values()):
            heard, _, _ = select.select([server, *ranks], [], [], max(0, until - time.monotonic()))
            if not heard:
                raise TimeoutError(f"without rank {', '.join(map(str, sorted(missing)))}")
            for one in heard:
                if one is server:
                    ranks[server.accept()[0]] = None
                elif (rank := _number(one)) in range(1, world):
                    ranks[one] = rank
                else:  # it has ended, or is a stranger
                    del ranks[one]
                    one.close()
        yield ranks
    finally:
        for one in ranks:
            one.close()


def _called(rank: int, address: tuple[str, int], until: float) -> int:
    """The port of the store, which the first process says once all are there."""
    reason = "the first process does not call"
    while (left := until - time.monotonic()) > 0:
        try:
            with socket.create_connection(address, timeout=min(SIGN, left)) as first:
                reason = "others are missing"
                while time.monotonic() < until:
                    first.sendall(rank.to_bytes(4))
                    with suppress(TimeoutError):
                        if (port := _number(first)) is not None:
                            return port
                        break
        except OSError as error:
            reason = str(error)
        time.sleep(AGAIN)
    raise TimeoutError(reason)


def _number(connection: socket.socket) -> int | None:
    """What the other end says; None once it has ended."""
    try:
        said = connection.recv(4)
    except ConnectionError:
        return None
    return int.from_bytes(said) if said else None
