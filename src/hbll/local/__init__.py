"""Local rules on networks cut into blocks, behind one interface.

network = SequentialNetwork(*modules)         # the last one gives the logits; or a TreeNetwork, or an nn.Sequential
rule = make_rule("bll", blocks=4).prepare(network, x)
step = rule(network, x, y)
step.loss.backward()                          # any torch optimizer then moves the parameters of network and rule
"""

from collections.abc import Callable, Mapping
from typing import Any

from hbll.cuts import SequentialNetwork
from hbll.local.backpropagation import Backpropagation
from hbll.local.rule import LocalRule, LocalStep
from hbll.names import check_known

__all__ = ["METHODS", "Backpropagation", "LocalRule", "LocalStep", "SequentialNetwork", "make_rule"]

METHODS: Mapping[str, Callable[..., LocalRule]] = {
    "bp": Backpropagation,
}
"""The rules by name, each with its paper's own tuning."""


def make_rule(method: str, **options: Any) -> LocalRule:
    """The rule of that name, with some of its options replaced.

    Raises:
        ValueError: no such method.
    """
    return METHODS[check_known(method, METHODS, "rule")](**options)
