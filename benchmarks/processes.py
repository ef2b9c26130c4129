"""Processes that train together: starting them, and running the schedules of hbll.distributed in them with real messages."""

import os
import resource
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from hbll.distributed.simulate import Op, Schedule, Span, messages

LIMIT = timedelta(minutes=10)
"""How long a process waits for the others before it gives up."""

AHEAD = 4
"""Messages that a process makes room for before it needs them."""


def launched() -> bool:
    """Whether this process has been started with others, by torchrun or whoever sets RANK and WORLD_SIZE."""
    return "RANK" in os.environ


def launch(count: int) -> int:
    """Starts this command again in so many processes on this machine, as torchrun would.

    Returns:
        The first exit status that is not 0; one that fails ends the others.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    told |= {"GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, *sys.argv], env=os.environ | told | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in range(count)
    ]
    try:
        while any(process.poll() is None for process in running) and not any(process.poll() for process in running):
            time.sleep(0.05)
        return next((process.returncode for process in running if process.returncode), 0)
    finally:
        for process in running:  # the others of one that has failed
            process.kill()
            process.wait()


def join() -> tuple[int, int, torch.device]:
    """Joins the others: rank, number of processes, and the device, a GPU each where there are enough."""
    world = int(os.environ["WORLD_SIZE"])
    on_gpu = torch.cuda.device_count() >= world
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=LIMIT)
    return dist.get_rank(), world, device


def leave() -> None:
    """Ends at once: threads of gloo may stumble over each other at the end of a process."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def largest(value: float, device: torch.device) -> float:
    """The largest of what all processes say."""
    found = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.item()


def total(value: float, device: torch.device) -> float:
    """The sum of what all processes say."""
    found = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(found)
    return found.item()


def sent_bytes() -> float | None:
    """What has been sent so far through the interface of gloo, headers among it; on the loopback by all processes together.
    None if the interface is not known, or messages do not go through gloo."""
    if dist.get_backend() != "gloo":
        return None
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    with open("/proc/self/net/dev") as lines:
        for line in lines:
            name, _, counters = line.partition(":")
            if name.strip() == interface:
                return float(counters.split()[8])
    return None


def memory() -> int:
    """Most bytes that this process has held in memory."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def execute(
    schedule: Schedule,
    rank: int,
    perform: Callable[[Op, Mapping[Op, Tensor]], Tensor | None],
    empty: Callable[[Op], Tensor],
) -> dict[Op, Span]:
    """Runs a device's operations, messages crossing as they become ready.

    Args:
        perform: an operation on what other devices sent for it; its result, where others need it.
        empty: room for the result of an operation.

    Returns:
        When each of them ran, by a clock that all processes of a machine share.
    """
    owner, receivers = schedule.owner, messages(schedule)
    tags = {op: tag for tag, op in enumerate(owner)}
    mine = schedule.devices[rank]
    coming = deque(dict.fromkeys(n for op in mine for n in schedule.needs.get(op, ()) if owner[n] != rank))
    expected: dict[Op, tuple[Tensor, dist.Work]] = {}
    here: dict[Op, Tensor] = {}
    last = {n: op for op in mine for n in schedule.needs.get(op, ())}
    sending: list[tuple[dist.Work, Tensor]] = []  # tensors are held until they are sent
    times: dict[Op, Span] = {}
    for op in mine:
        needs = [n for n in schedule.needs.get(op, ()) if owner[n] != rank]
        while coming and (len(expected) < AHEAD or any(n in coming for n in needs)):
            source = coming.popleft()
            room = empty(source)
            expected[source] = room, _work(dist.irecv(room, owner[source], tag=tags[source]))
        for need in needs:
            if need in expected:
                here[need], work = expected.pop(need)
                work.wait()
        began = time.perf_counter()
        result = perform(op, {n: here[n] for n in needs})
        times[op] = Span(began, time.perf_counter())
        for need in needs:
            if last[need] == op:
                del here[need]
        for receiver in receivers.get(op, ()):
            assert result is not None
            sending.append((_work(dist.isend(result, receiver, tag=tags[op])), result))
    for work, _ in sending:
        work.wait()
    return times


def _work(work: dist.Work | None) -> dist.Work:
    assert work is not None
    return work


def gathered(times: Mapping[Op, Span], world: int) -> dict[Op, Span]:
    """When the operations of all processes ran, from the first one on."""
    found: Sequence[Mapping[Op, Span] | None] = [None] * world
    dist.all_gather_object(found, dict(times))
    merged = {op: span for one in found if one for op, span in one.items()}
    begun = min(span.start for span in merged.values())
    return {op: Span(start - begun, end - begun) for op, (start, end) in merged.items()}
