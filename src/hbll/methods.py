"""The local rules by the names that users call them."""

from collections.abc import Callable, Mapping
from typing import Any

from hbll.bll import BLL
from hbll.local.backpropagation import Backpropagation
from hbll.local.contrastive import ContrastiveForwardForward
from hbll.local.feedback_alignment import DirectFeedbackAlignment
from hbll.local.forward_forward import ForwardForward
from hbll.local.greedy import DecoupledGreedy
from hbll.local.predsim import PredSim
from hbll.local.rule import LocalRule
from hbll.names import check_known

__all__ = ["METHODS", "make_rule"]

METHODS: Mapping[str, Callable[..., LocalRule]] = {
    "bp": Backpropagation,
    "bll": BLL,
    "dgl": DecoupledGreedy,
    "predsim": PredSim,
    "ff": ForwardForward,
    "cff": ContrastiveForwardForward,
    "dfa": DirectFeedbackAlignment,
}
"""Each rule with its paper's own tuning."""


def make_rule(method: str, **options: Any) -> LocalRule:
    """The rule of that name, with some of its options replaced.

    Raises:
        ValueError: no such method.
    """
    return METHODS[check_known(method, METHODS, "rule")](**options)
