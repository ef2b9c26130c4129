"""hbll: deep networks trained without end-to-end backpropagation, in O(log N) sequential steps."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hbll.locality import Audit, audit
    from hbll.network import TreeNetwork
    from hbll.objective import NodeReport, Objective, Step
    from hbll.tree import Tree

__all__ = ["Audit", "NodeReport", "Objective", "Step", "Tree", "TreeNetwork", "audit"]

_MODULES = {
    "Audit": "locality",
    "audit": "locality",
    "TreeNetwork": "network",
    "NodeReport": "objective",
    "Objective": "objective",
    "Step": "objective",
    "Tree": "tree",
}


def __getattr__(name: str) -> Any:
    # Names are looked up when they are used: torch takes a second to import, which `hbll --help` need not wait for.
    if name in _MODULES:
        return getattr(import_module(f"hbll.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'hbll' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
