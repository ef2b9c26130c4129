"""Roll calls, by threads that are a process each."""

import contextlib
import socket
import time
from datetime import timedelta
from threading import Thread

import pytest
from tests.training import free_port

from hbll.distributed.rollcall import roll_call

HOST = "127.0.0.1"


class Call:
    """A roll call of three."""

    def __init__(self):
        self.port = free_port()
        self.stores = {}

    def comes(self, rank):
        thread = Thread(target=self._answer, args=[rank], daemon=True)
        thread.start()
        return thread

    def _answer(self, rank):
        self.stores[rank] = roll_call(rank, 3, HOST, self.port, 30, timedelta(seconds=30))

    def connected(self):
        """A connection to the first process, once it calls."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with contextlib.suppress(ConnectionRefusedError):
                return socket.create_connection((HOST, self.port))
            time.sleep(0.01)
        raise AssertionError("the first process does not call")

    def check_met(self, *threads):
        """All have come to one store."""
        for thread in threads:
            thread.join(30)
        self.stores[0].set("said", "by the first")
        assert [self.stores[rank].get("said") for rank in (1, 2)] == [b"by the first"] * 2


def test_who_ends_meanwhile_is_waited_for_again():
    call = Call()
    first = call.comes(0)
    with call.connected() as lost:
        lost.sendall((1).to_bytes(4))
    second = call.comes(2)
    second.join(0.5)
    assert second.is_alive()
    call.check_met(first, second, call.comes(1))


def test_a_first_process_that_ends_is_waited_for_again():
    call = Call()
    with socket.create_server((HOST, call.port)) as lost:
        second = call.comes(1)
        connection, _ = lost.accept()
        with connection:
            assert connection.recv(4) == (1).to_bytes(4)
    call.check_met(call.comes(0), second, call.comes(2))


def test_strangers_are_not_counted():
    call = Call()
    first, second = call.comes(0), call.comes(1)
    with call.connected() as stranger, call.connected():
        stranger.sendall(b"GET ")
        assert not stranger.recv(4)
        call.check_met(first, second, call.comes(2))


def test_the_wait_has_an_end():
    with pytest.raises(TimeoutError, match="without rank 1, 2"):
        roll_call(0, 3, HOST, free_port(), 0.1, timedelta(seconds=1))
    with pytest.raises(TimeoutError, match="refused"):
        roll_call(1, 3, HOST, free_port(), 0.1, timedelta(seconds=1))
    with socket.create_server((HOST, 0)) as silent, pytest.raises(TimeoutError, match="others are missing"):
        roll_call(1, 3, HOST, silent.getsockname()[1], 0.1, timedelta(seconds=1))
