"""HBLL-RNN: recurrent networks trained over a tree, or over parallel chunks, of time steps.

network = RecurrentNetwork(DepthCells(GRU, inputs, width, depths), head=nn.Linear(width, classes), length=64)
rule = make_rule("hbll", network)    # or ScanRule(network, 64, chunk=4, sweeps=3, guess="tree"), PaperRule(network), ..
step = rule(x, y)                    # x (B, N, inputs), or a pair (x, lengths)
step.loss.backward()                 # any torch optimizer then moves rule.parameters(); or rule.backward(x, y)
logits = network(x)                  # the deployed chain
"""

import inspect
from collections.abc import Mapping
from typing import Any

from hbll.models.cells import CELLS, GRU, LSTM, Cell, Elman, OneHot, Slopes
from hbll.names import check_known
from hbll.recurrent.arcs import ArcCells, DepthCells, SharedCell
from hbll.recurrent.bptt import Backpropagation, FusedBackpropagation
from hbll.recurrent.network import RecurrentNetwork, Sequences, check_network
from hbll.recurrent.newton import Newton
from hbll.recurrent.paper_rule import PaperRule
from hbll.recurrent.rule import RecurrentRule
from hbll.recurrent.scan_rule import ScanRule

__all__ = [
    "CELLS",
    "GRU",
    "LSTM",
    "RULES",
    "ArcCells",
    "Backpropagation",
    "Cell",
    "DepthCells",
    "Elman",
    "FusedBackpropagation",
    "Newton",
    "OneHot",
    "PaperRule",
    "RecurrentNetwork",
    "RecurrentRule",
    "ScanRule",
    "Sequences",
    "SharedCell",
    "Slopes",
    "make_rule",
]

RULES: Mapping[str, type[RecurrentRule]] = {
    "hbll": ScanRule,
    "paper": PaperRule,
    "bptt": Backpropagation,
    "bptt-fused": FusedBackpropagation,
    "deer": Newton,
}
"""The best configuration found (the scan), the published rule, and the exact gradient in three ways."""


def make_rule(name: str, network: RecurrentNetwork, length: int | None = None, **options: Any) -> RecurrentRule:
    """The rule of that name for a recurrent network.

    Args:
        name: one of ``RULES``.
        network: the network to train.
        length: N, chunks of a sequence; by default the network's own. Rules that take sequences of any length ignore it.
        options: of the rule's class; those of the scan that are not given are ``ScanRule.suggested``.

    Raises:
        ValueError: an unknown rule, option or value; a cell that the rule has no network for; a scan without a length.
    """
    check_network(network)
    kind = RULES[check_known(name, RULES, "rule for recurrent networks")]
    known = [name for name, p in inspect.signature(kind).parameters.items() if p.kind is p.KEYWORD_ONLY]
    for option in options:
        check_known(option, known, f"option of {name}")
    if kind is not ScanRule:
        return kind(network, **options)
    if length is None:
        length = network.length
    if length is None:
        raise ValueError(f"{name} is made for sequences of one length: give length=, here or to the network")
    return ScanRule(network, length, **{**ScanRule.suggested(length, network.cell.parts), **options})
