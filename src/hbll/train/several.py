"""Runs trained as they fall due: one after the other in this process, or several at once in processes of their own."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import TypeAlias

import torch

from hbll.train.divergence import DivergedError
from hbll.train.evaluate import OnBatch
from hbll.train.loop import train
from hbll.train.run import Run

OnStep: TypeAlias = Callable[[Run, int, int], None]

Start: TypeAlias = Callable[[Run], "Future[str | None]"]
"""Begins a run, which ends as a future: what made it diverge, or None."""

TELLS_EVERY = 0.2
"""Seconds between two words of a process about how far it is."""


def train_several(
    due: Callable[[], Iterable[Run]],
    workers: int = 1,
    *,
    on_run: Callable[[Run], None] = lambda run: None,
    on_step: OnStep = lambda run, done, steps: None,
    on_end: Callable[[Run, str | None], None] = lambda run, diverged: None,
) -> None:
    """Trains, or goes on with, every run that is due, until none is left.

    Args:
        due: the runs that are to be made by what is known so far, in this order; asked again whenever one has ended. None is
            begun twice.
        workers: how many are trained at once; if several, each in a process, on a CPU with one thread.
        on_run: called before each run.
        on_step: as of `train`, with the run; of processes from a thread, and not for every step.
        on_end: called after each run, with what `train` says if it diverged.

    Raises:
        ValueError: as of `train`, but for divergence; or a process was killed.
        KeyboardInterrupt: Ctrl-C was pressed, or SIGTERM sent; all runs under way were saved.
    """
    begun: set[Path] = set()
    under_way: dict[Future[str | None], Run] = {}
    with _processes(workers, on_step) if workers > 1 else _here(on_step) as start:
        while True:
            for run in due():
                if len(under_way) < workers and run.folder not in begun:
                    begun.add(run.folder)
                    on_run(run)
                    under_way[start(run)] = run
            if not under_way:
                return
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                on_end(under_way.pop(future), future.result())


def _train(run: Run, on_step: Callable[[int, int], None], on_batch: OnBatch = lambda done, batches: None) -> str | None:
    try:
        train(run, resume=run.configuration_file.exists(), on_step=on_step, on_batch=on_batch)
    except DivergedError as error:
        return str(error)
    return None


@contextmanager
def _here(on_step: OnStep) -> Iterator[Start]:
    """What trains a run at once, and returns when it has ended."""

    def start(run: Run) -> Future[str | None]:
        future: Future[str | None] = Future()
        future.set_result(_train(run, partial(on_step, run)))
        return future

    yield start


@contextmanager
def _processes(workers: int, on_step: OnStep) -> Iterator[Start]:
    """What hands a run to one of so many processes. Whatever ends the block early, they save what is under way."""
    context = multiprocessing.get_context("spawn")  # after a fork there is no CUDA
    stop, told = context.Event(), context.SimpleQueue()

    def listen() -> None:
        for run, done, steps in iter(told.get, None):
            on_step(run, done, steps)

    listener = threading.Thread(target=listen)
    listener.start()
    try:
        with ProcessPoolExecutor(workers, context, _begin, (stop, told)) as pool:

            def start(run: Run) -> Future[str | None]:
                with _uninterrupted():
                    return pool.submit(_train_apart, run)

            try:
                yield start
            finally:
                stop.set()
    except BrokenProcessPool as error:
        raise ValueError(
            "a process that trained was killed, as for want of memory: try fewer --workers; the same command goes on"
        ) from error
    finally:
        told.put(None)
        listener.join()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Inside, Ctrl-C is ignored; by processes that begin there for good, which outside of `train` have nothing to save."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


_stop: Event
_told: "SimpleQueue[tuple[Run, int, int] | None]"
"""Of a process that trains: whether it is to end, and where it tells how far it is."""


def _begin(stop: Event, told: "SimpleQueue[tuple[Run, int, int] | None]") -> None:
    global _stop, _told
    _stop, _told = stop, told
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Lets this process be killed with the one that began it, which it would outlive otherwise."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _train_apart(run: Run) -> str | None:
    last = 0.0

    def heed() -> None:
        if _stop.is_set():
            signal.raise_signal(signal.SIGINT)  # as if Ctrl-C had been pressed here: `train` saves and ends

    def on_step(done: int, steps: int) -> None:
        nonlocal last
        heed()
        if time.monotonic() > last + TELLS_EVERY:
            last = time.monotonic()
            _told.put((run, done, steps))

    return _train(run, on_step, lambda done, batches: heed())
