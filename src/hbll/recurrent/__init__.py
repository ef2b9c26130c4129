"""HBLL-RNN: recurrent networks trained over a tree, or over parallel chunks, of time steps.

network = RecurrentNetwork(DepthCells(GRU, inputs, width, depths), head=nn.Linear(width, classes))
rule = make_rule("hbll", network, length)    # or ScanRule(network, length, chunk=4, sweeps=3, guess="tree"), PaperRule(), ..
step = rule(network, x, y)                   # x (B, N, inputs)
step.loss.backward()                         # any torch optimizer then moves the parameters of network and rule
logits = network(x)                          # the deployed chain
"""

from hbll.models.cells import CELLS, GRU, LSTM, Cell, Elman, OneHot, Slopes
from hbll.recurrent.arcs import ArcCells, DepthCells, SharedCell
from hbll.recurrent.bptt import Backpropagation, FusedBackpropagation
from hbll.recurrent.methods import METHODS, make_rule
from hbll.recurrent.network import RecurrentNetwork
from hbll.recurrent.newton import Newton
from hbll.recurrent.paper_rule import PaperRule
from hbll.recurrent.scan_rule import ScanRule
from hbll.recurrent.step import RecurrentRule, RecurrentStep

__all__ = [
    "CELLS",
    "GRU",
    "LSTM",
    "METHODS",
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
    "RecurrentStep",
    "ScanRule",
    "SharedCell",
    "Slopes",
    "make_rule",
]
