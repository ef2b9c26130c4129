"""hbll: deep networks trained without end-to-end backpropagation, in O(log N) sequential steps."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hbll.adapt import part
    from hbll.cut import Stage
    from hbll.locality import Audit, audit
    from hbll.network import Chain
    from hbll.rule import Report, Rule, StageLoss, Step
    from hbll.rules import make_rule

__version__ = "0.1.0"

__all__ = ["Audit", "Chain", "Report", "Rule", "Stage", "StageLoss", "Step", "audit", "make_rule", "part"]

_MODULES = {
    "Audit": "locality",
    "Chain": "network",
    "Report": "rule",
    "Rule": "rule",
    "Stage": "cut",
    "StageLoss": "rule",
    "Step": "rule",
    "audit": "locality",
    "make_rule": "rules",
    "part": "adapt",
}

_ROOMS = ("cut", "distributed", "exits", "generate", "models", "recurrent", "rules", "train")
"""Modules with functions of their own that are reached by their names: ``hbll.train.fit``."""

_FORMER = {
    "TreeNetwork": "hbll.Chain",
    "Objective": "hbll.make_rule(name, network, ...), which owns its network",
}
"""Names that whoever knew an earlier version may look for."""


def __getattr__(name: str) -> Any:
    # Names are looked up when they are used: torch takes a second to import, which `hbll --help` need not wait for.
    if name in _MODULES:
        return getattr(import_module(f"hbll.{_MODULES[name]}"), name)
    if name in _ROOMS:
        return import_module(f"hbll.{name}")
    if name in _FORMER:
        raise ImportError(
            f"hbll.{name} is now {_FORMER[name]}"
        )  # an AttributeError would lose its sentence in `from hbll import`
    raise AttributeError(f"module 'hbll' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_ROOMS])
