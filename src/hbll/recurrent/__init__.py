"""HBLL-RNN: recurrent networks trained over a tree, or over parallel chunks, of time steps.

network = RecurrentNetwork(DepthCells(GRU, inputs, width, depths), head=nn.Linear(width, classes))
rule = ScanRule(network, length, chunk=4, sweeps=3, guess="tree")    # or PaperRule(), Backpropagation(), Newton(), ..
step = rule(network, x, y)                                           # x (B, N, inputs)
step.loss.backward()                                                 # any torch optimizer
logits = network(x)                                                  # the deployed chain
"""

from hbll.models.cells import CELLS, GRU, LSTM, Cell, Elman, Slopes
from hbll.recurrent.arcs import ArcCells, DepthCells, SharedCell
from hbll.recurrent.bptt import Backpropagation, FusedBackpropagation
from hbll.recurrent.network import RecurrentNetwork
from hbll.recurrent.newton import Newton
from hbll.recurrent.paper_rule import PaperRule
from hbll.recurrent.scan_rule import ScanRule
from hbll.recurrent.step import RecurrentRule, RecurrentStep

__all__ = [
    "CELLS",
    "GRU",
    "LSTM",
    "ArcCells",
    "Backpropagation",
    "Cell",
    "DepthCells",
    "Elman",
    "FusedBackpropagation",
    "Newton",
    "PaperRule",
    "RecurrentNetwork",
    "RecurrentRule",
    "RecurrentStep",
    "ScanRule",
    "SharedCell",
    "Slopes",
]
