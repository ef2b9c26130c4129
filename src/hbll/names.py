"""Names that users type, and the values that they give to options."""

import difflib
import math
from collections.abc import Iterable

__all__ = ["check_choice", "check_known", "check_number"]


def check_known(name: str, names: Iterable[str], what: str) -> str:
    """``name`` when it is one of ``names``.

    Raises:
        ValueError: it is none; the message suggests the nearest one, or lists all.
    """
    names = list(names)
    if name in names:
        return name
    if not isinstance(name, str):
        raise ValueError(f"give the {what} by its name, one of {', '.join(names)}; got {name!r}")
    near = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
    raise ValueError(f"unknown {what} {name!r}; {hint}")


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """ValueError unless the option of that name has one of these values."""
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"{name} is one of {', '.join(choices)}; got {value!r}")


def check_number(name: str, value: object, *, least: float | None = None, above: float | None = None) -> None:
    """ValueError unless the option of that name is a number: a whole one if ``least`` is one, at least that, or
    above a bound and finite."""
    whole = isinstance(least, int)
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise ValueError(f"{name} is a {'whole number' if whole else 'number'}; got {value!r}")
    if least is not None and not value >= least:
        least_words = "not be negative" if least == 0 and value < 0 else f"be at least {least:g}"
        raise ValueError(f"{name} must {least_words}; got {value}")
    if above is not None and not value > above:
        raise ValueError(f"{name} must be {'positive' if above == 0 else f'above {above}'}; got {value}")
    if least is None and not math.isfinite(value):
        raise ValueError(f"{name} must be finite; got {value}")
