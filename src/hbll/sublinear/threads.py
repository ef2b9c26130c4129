"""Chunks of rows shared out over threads, with results in the order of the chunks whatever the number of threads.

The compiled kernels release the interpreter's lock, so plain threads run them in parallel; numba's own parallel loops
would need a second thread pool that not every platform's threading layer lets several callers enter.
NUMBA_NUM_THREADS sets the number.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TypeVar

from numba import config
from threadpoolctl import ThreadpoolController

__all__ = ["in_chunks", "one_blas_thread", "thread_count"]

Result = TypeVar("Result")
Chunk = tuple[int, int]


def thread_count() -> int:
    return config.NUMBA_NUM_THREADS  # pyrefly: ignore[missing-attribute]


@cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads that stay, because starting them takes longer than a small chunk; a forked process needs its own."""
    return ThreadPoolExecutor(threads - 1)


def in_chunks(work: Callable[[Iterable[Chunk]], Iterable[Result]], rows: int, size: int) -> list[Result]:
    """Cut range(rows) into chunks of `size` and return one result per chunk, in order.

    `work` maps an iterable of chunks (first, last + 1) to their results, one by one; each thread calls it once and
    draws from the common queue, so that its scratch arrays are made once per thread. BLAS runs on one thread inside
    each.
    """
    chunks = [(first, min(first + size, rows)) for first in range(0, rows, size)]
    queue = iter(range(len(chunks)))
    results: dict[int, Result] = {}

    def drain() -> None:
        taken: list[int] = []

        def mine() -> Iterator[Chunk]:
            for index in queue:
                taken.append(index)
                yield chunks[index]

        for done, result in enumerate(work(mine())):
            results[taken[done]] = result

    helpers = min(thread_count(), len(chunks)) - 1
    with _libraries().limit(limits=1, user_api="blas"):
        if helpers == 0:
            drain()
        else:
            pool = _pool(os.getpid(), thread_count())
            others = [pool.submit(drain) for _ in range(helpers)]
            drain()
            for other in others:
                other.result()
    return [results[index] for index in range(len(chunks))]


def one_blas_thread(points: int) -> AbstractContextManager[object]:
    """Keep the factorisation of a small matrix on one thread: more gain nothing, and lose much where the cores are
    shared.
    """
    return _libraries().limit(limits=1, user_api="blas") if points < 1024 else nullcontext()
