"""The machine's memory, and what is refused because it would not fit."""

import math
import os
from pathlib import Path

__all__ = ["machine_bytes", "refuse_beyond"]


def machine_bytes() -> float:
    """The memory of the machine, or of the container's share of it; unbounded where the system does not tell."""
    if not hasattr(os, "sysconf"):
        return math.inf
    total = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        total = min(total, float(text))
    return total


def refuse_beyond(needed: float, what: str) -> None:
    """Raise ValueError where `what` needs more bytes than the machine has."""
    if needed > machine_bytes():
        raise ValueError(
            f"{what} would need {needed / 2**30:.3g} GiB of memory, "
            f"and this machine has {machine_bytes() / 2**30:.3g} GiB"
        )
