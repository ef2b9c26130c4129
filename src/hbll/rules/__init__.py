"""The training rules, by the names that users call them."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from hbll.names import check_known
from hbll.network import Chain
from hbll.rule import Rule
from hbll.rules.backprop import Backpropagation
from hbll.rules.bll import BLL
from hbll.rules.contrastive import ContrastiveForwardForward
from hbll.rules.decoupled import DecoupledGreedy
from hbll.rules.feedback_alignment import DirectFeedbackAlignment
from hbll.rules.forward_forward import ForwardForward
from hbll.rules.late import TwoBufferedWeights
from hbll.rules.pipeline import Pipeline
from hbll.rules.predsim import PredSim
from hbll.rules.scan import Scan
from hbll.rules.stream import Greedy, Solo, Stream
from hbll.rules.tree import Paper, Tree

__all__ = [
    "BLL",
    "RULES",
    "Backpropagation",
    "ContrastiveForwardForward",
    "DecoupledGreedy",
    "DirectFeedbackAlignment",
    "ForwardForward",
    "Greedy",
    "Paper",
    "Pipeline",
    "PredSim",
    "Scan",
    "Solo",
    "Stream",
    "Tree",
    "TwoBufferedWeights",
    "make_rule",
    "options_of",
]

RULES: Mapping[str, type[Rule]] = {
    "paper": Paper,
    "tree": Tree,
    "scan": Scan,
    "stream": Stream,
    "greedy": Greedy,
    "solo": Solo,
    "pipeline": Pipeline,
    "2bw": TwoBufferedWeights,
    "bp": Backpropagation,
    "dgl": DecoupledGreedy,
    "predsim": PredSim,
    "ff": ForwardForward,
    "cff": ContrastiveForwardForward,
    "dfa": DirectFeedbackAlignment,
    "bll": BLL,
}
"""Each rule with its paper's own tuning."""


def options_of(name: str) -> list[str]:
    """The options that the rule of that name reads."""
    known = {}
    for kind in RULES[name].__mro__:
        if "__init__" in vars(kind) and issubclass(kind, Rule):
            parameters = inspect.signature(kind.__init__).parameters.values()
            known |= dict.fromkeys(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
            if all(p.kind is not p.VAR_KEYWORD for p in parameters):
                break  # it hands nothing on that it does not name
    return list(known)


def make_rule(name: str, network: Chain, example: Any = None, **options: Any) -> Rule:
    """The rule of that name for a network.

    Args:
        name: one of ``RULES``.
        network: the network to train.
        example: a batch of inputs, from which rules with modules of their own see the shapes of states; without it those
            modules take their shapes from the first step, as torch's lazy ones do. Rules without such modules ignore it.
        options: of the rule's class.

    Raises:
        ValueError: an unknown rule, option or value; the message names the nearest one.
    """
    if isinstance(name, nn.Module):
        raise ValueError("the name of the rule comes first: make_rule('stream', network)")
    kind = RULES[check_known(name, RULES, "rule")]
    for option in options:
        if option == "stages":
            raise ValueError(
                "stage= is the number of blocks in a stage, or one for every stage: for two stages take "
                "stage=hbll.cut.even(network, 2)"
            )
        check_known(option, options_of(name), f"option of {name}")
    rule = kind(network, **options)
    if example is not None:
        rule.build(example)
    return rule
