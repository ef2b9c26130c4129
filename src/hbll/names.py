"""Names that users type."""

import difflib
from collections.abc import Iterable

__all__ = ["check_known"]


def check_known(name: str, names: Iterable[str], what: str) -> str:
    """``name`` when it is one of ``names``.

    Raises:
        ValueError: it is none; the message suggests the nearest one, or lists all.
    """
    names = list(names)
    if name in names:
        return name
    near = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
    raise ValueError(f"unknown {what} {name!r}; {hint}")
