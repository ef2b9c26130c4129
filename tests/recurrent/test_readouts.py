"""The named ways through a recurrent network, and which of them a rule trains."""

import pytest
import torch
from torch import nn

from hbll.calls import Readout
from hbll.recurrent import CELLS, GRU, RULES, DepthCells, RecurrentNetwork, make_rule


def network_of(depth: int, every_step: bool = False) -> RecurrentNetwork:
    return RecurrentNetwork(DepthCells(GRU, 2, 4, depth), nn.Linear(4, 3), every_step, length=2**depth)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("depth", [2, 3, 4])
def test_there_is_a_chain_and_a_tree_where_the_rule_trains_one(name, depth):
    readouts = make_rule(name, network_of(depth)).readouts
    counts = {readout.name: readout.blocks for readout in readouts}
    # A cell a chunk; along the tree's edge one for every halving of the sequence, and the last step.
    assert counts == {"chain": 2**depth} | ({"tree": depth + 1} if name == "paper" else {})
    assert readouts[0].name == "chain"


@pytest.mark.parametrize("every_step", [True, False])
def test_a_sequence_of_one_chunk_has_the_chain_alone(every_step):
    network = RecurrentNetwork(DepthCells(GRU, 2, 4, 1), nn.Linear(4, 3), every_step, length=1)
    assert network.readouts == make_rule("bptt", network).readouts == [Readout("chain", (), 1)]
    assert network.readout("chain").path == ()


@pytest.mark.parametrize("name", ["chain", "tree", "4-6-7"])
def test_the_cells_of_a_readout_are_those_that_it_evaluates(name, monkeypatch):
    network = network_of(3)
    readout = network.readout(name)
    calls, advance = [], CELLS["gru"].advance
    monkeypatch.setattr(CELLS["gru"], "advance", lambda *args: calls.append(1) or advance(*args))
    network(torch.zeros(2, 8, 2), path=readout.path)
    assert len(calls) == readout.blocks


def test_own_names_come_before_times():
    network = network_of(3)
    assert network.readout("rim").name == network.readout("4-6-7").name == "tree"
    assert network.readout("1-2-3-4-5-6-7").name == "chain"
    assert network.readout("4-6") == Readout("4-6", (4, 6), 3)
    with pytest.raises(ValueError, match="'short' is not a path"):
        network.readout("short")


@pytest.mark.parametrize("name", ["paper", "hbll", "bptt"])
def test_outputs_of_every_step_are_the_chains_alone(name):
    (readout,) = make_rule(name, network_of(3, every_step=True)).readouts
    assert (readout.name, readout.blocks) == ("chain", 8)
