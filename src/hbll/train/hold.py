"""A folder that one process at a time writes into."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from hbll.files import write_atomically


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Inside, the folder, which is made if there is none, is this process's alone; its end, even by a kill, frees it.

    Raises:
        ValueError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    holder = folder / ".holder"
    try:
        with FileLock(folder / ".lock", timeout=0):
            write_atomically(holder, f"process {os.getpid()} on {platform.node()}")
            yield
    except Timeout as error:
        by = holder.read_text(encoding="utf-8") if holder.exists() else "another process"
        raise ValueError(f"{folder} is being written by {by}: wait for its end, or give another --run-dir") from error
