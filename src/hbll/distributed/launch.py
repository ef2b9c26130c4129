"""Processes that a launcher has started: how they come together, and how they agree."""

import os
import threading
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from hbll.distributed.link import lost
from hbll.distributed.rollcall import roll_call

__all__ = ["Backend", "all_say", "first_says", "join", "launched", "processes_of", "rank_of", "wait_for_all"]

Backend: TypeAlias = Literal["gloo", "nccl"]

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher such as torchrun tells a process: its number, from 0, the number of processes, and where they meet."""


def launched(environment: Mapping[str, str]) -> bool:
    """Whether a launcher has said anything."""
    return any(name in environment for name in VARIABLES)


def processes_of(environment: Mapping[str, str]) -> int:
    """The number of processes that a launcher has started; 1 if it says nothing that is a number."""
    said = environment.get("WORLD_SIZE", "")
    return int(said) if said.isdecimal() else 1


def rank_of(environment: Mapping[str, str]) -> int:
    """The number of this process.

    Raises:
        ValueError: what a launcher says is missing, or is no number.
    """
    missing = [name for name in VARIABLES if name not in environment]
    if missing:
        raise ValueError(
            f"several processes are started by torchrun, or by whatever sets {', '.join(VARIABLES)}: "
            f"{', '.join(missing)} is not set"
        )
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        if not environment[name].isdecimal():
            raise ValueError(f"{name} is a number; got {environment[name]!r}")
    rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    if rank >= world:
        raise ValueError(f"RANK counts from 0: of {world} processes the last is {world - 1}, not {rank}")
    return rank


def join(seconds: float, backend: Backend | None = None, patience: float | None = None) -> None:
    """Joins the other processes, and takes a GPU where there is one.

    Args:
        seconds: for which a process waits for another one, here and in all that follows.
        backend: what carries messages; by default nccl where every process of the machine has a GPU of its own, else gloo.
        patience: seconds for which the processes wait here, instead, for such as may end meanwhile and come again.

    Raises:
        ValueError: nccl without enough GPUs; the processes do not come together, or another program listens at their port.
        TimeoutError: with ``patience``, the processes do not come together.
        ConnectionError: one of them was lost when all had come.
    """
    rank, gpus = rank_of(os.environ), torch.cuda.device_count()
    place, beside = (int(os.environ.get(f"LOCAL_{name}", os.environ[name])) for name in ("RANK", "WORLD_SIZE"))
    if backend == "nccl" and gpus < beside:
        raise ValueError(
            f"nccl needs a GPU for each of the {beside} processes of a machine, which has {gpus}: take gloo"
        )
    if gpus:
        torch.cuda.set_device(place % gpus)
    limit = timedelta(seconds=seconds)
    # Of groups that are made later, which do not ask the first one.
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = limit
    chosen = backend or ("nccl" if 0 < beside <= gpus else "gloo")
    failed: list[Exception] = []

    def meet() -> None:
        try:
            if patience is None:
                dist.init_process_group(chosen, timeout=limit)
                return
            world, host, port = (os.environ[name] for name in VARIABLES[1:])
            with lost("another process"):
                store = roll_call(rank, int(world), host, int(port), patience, limit)
                dist.init_process_group(chosen, timeout=limit, store=store, rank=rank, world_size=int(world))
        except (RuntimeError, ValueError, OSError, OverflowError) as error:  # the last of a port beyond all
            failed.append(error)

    # Beside the main thread: what takes the connection and never answers is waited for without a limit.
    meeting = threading.Thread(target=meet, daemon=True)
    meeting.start()
    meeting.join(2 * seconds + (patience or 0))
    if meeting.is_alive():
        failed.append(TimeoutError("there was no answer"))
    if failed:
        error = failed[0]
        if isinstance(error, ConnectionError):
            raise error
        kind = TimeoutError if patience and isinstance(error, TimeoutError) else ValueError
        raise kind(_not_joined(rank, patience or seconds, str(error))) from error
    wait_for_all()  # or the first one might end, with what others ask for to meet


def _not_joined(rank: int, seconds: float, reason: str) -> str:
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if "address already in use" in reason.lower():
        return f"another program listens at {address}, where the processes were to meet: give another MASTER_PORT"
    first = reason.strip().splitlines()[0]
    return (
        f"process {rank} of {os.environ['WORLD_SIZE']} did not meet the others at {address} within {seconds:g} seconds: "
        f"start all of them, with the same address and port ({first})"
    )


def first_says(value: Any) -> Any:
    """What the first process has for the others, which give anything.

    Raises:
        ConnectionError: a process is lost.
    """
    said = [value]
    with lost("the first process"):
        dist.broadcast_object_list(said, 0)
    return said[0]


def all_say(value: Any) -> list[Any]:
    """What every process says, in the order of ranks.

    Raises:
        ConnectionError: a process is lost.
    """
    said: list[Any] = [None] * dist.get_world_size()
    with lost("another process"):
        dist.all_gather_object(said, value)
    return said


def wait_for_all() -> None:
    """Goes on once every process has come here.

    Raises:
        ConnectionError: a process is lost.
    """
    with lost("another process"):
        dist.barrier()
