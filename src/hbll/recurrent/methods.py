"""The training rules by the names that users call them."""

from hbll.recurrent.bptt import Backpropagation, FusedBackpropagation
from hbll.recurrent.network import RecurrentNetwork
from hbll.recurrent.newton import Newton
from hbll.recurrent.paper_rule import PaperRule
from hbll.recurrent.scan_rule import ScanRule
from hbll.recurrent.step import RecurrentRule

__all__ = ["METHODS", "make_rule"]

METHODS = ("hbll", "paper", "bptt", "bptt-fused", "deer")
"""The best configuration found (the scan), the published rule, and the exact gradient in three ways."""


def make_rule(method: str, network: RecurrentNetwork, length: int) -> RecurrentRule:
    """The rule of that name for sequences of N = ``length`` chunks; ``network`` is one like those to be trained.

    Raises:
        ValueError: no such method, or the fused one for a cell that torch does not have.
    """
    match method:
        case "hbll":
            return ScanRule(network, length, **ScanRule.suggested(length, network.cell.parts))
        case "paper":
            # The paper's choice: sweeps destabilise the Elman cell.
            return PaperRule(sweeps=4 if network.cell.gates > 1 else 0)
        case "bptt":
            return Backpropagation()
        case "bptt-fused":
            return FusedBackpropagation(network)
        case "deer":
            return Newton()
    raise ValueError(f"unknown method {method!r}; recurrent networks are trained by {', '.join(METHODS)}")
