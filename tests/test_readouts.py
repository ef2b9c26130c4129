import pytest
import torch
from torch import nn

from hbll import Objective, TreeNetwork
from hbll.cuts import SequentialNetwork
from hbll.layout import Readout
from hbll.local.backpropagation import Backpropagation
from hbll.models.cells import CELLS
from hbll.recipes import RECIPES
from hbll.recurrent import METHODS

Sequences = RECIPES["sequential-mnist"]


def tree_network(blocks):
    return TreeNetwork(embed=nn.Identity(), blocks=[nn.Identity() for _ in range(blocks)], head=nn.Identity())


def test_the_usual_ones_of_a_tree_are_the_chain_and_the_rim_cut_short():
    def found(blocks):
        return [(readout.name, readout.path) for readout in Objective("bp").readouts(tree_network(blocks))]

    assert found(7) == [("1-2-3-4-5-6-7", (1, 2, 3, 4, 5, 6, 7)), ("4", (4,)), ("4-6", (4, 6)), ("4-6-7", (4, 6, 7))]
    assert found(1) == [("1", (1,))]


def test_paths_of_a_tree_go_by_their_blocks():
    assert tree_network(7).readout("rim") == tree_network(7).readout("4-6-7") == Readout("4-6-7", (4, 6, 7), 3)
    assert tree_network(3).readout("chain") == Readout("1-2-3", (1, 2, 3), 3)
    with pytest.raises(ValueError, match="'tree' is not a path"):
        tree_network(3).readout("tree")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("depth", [2, 3, 4])
def test_a_recurrent_network_has_a_chain_and_a_tree_where_the_method_trains_one(method, depth):
    recipe = Sequences(depth=depth, width=4)
    readouts = recipe.objective(method).readouts(recipe.network())
    counts = {readout.name: readout.blocks for readout in readouts}
    # A cell a chunk; along the tree's edge one for every halving of the sequence, and the last step.
    assert counts == {"chain": 2**depth} | ({"tree": depth + 1} if method == "paper" else {})
    assert readouts[0].name == "chain"


@pytest.mark.parametrize("name", ["chain", "tree", "4-6-7"])
def test_the_cells_of_a_readout_are_those_that_it_evaluates(name, monkeypatch):
    network = Sequences(depth=3, width=4).network()
    readout = network.readout(name)
    calls, advance = [], CELLS["gru"].advance
    monkeypatch.setattr(CELLS["gru"], "advance", lambda *args: calls.append(1) or advance(*args))
    network(torch.zeros(2, 8, network.cell.inputs), path=readout.path)
    assert len(calls) == readout.blocks


def test_a_recurrent_networks_own_names_come_before_times():
    network = Sequences(depth=3, width=4).network()
    assert network.readout("rim").name == network.readout("4-6-7").name == "tree"
    assert network.readout("1-2-3-4-5-6-7").name == "chain"
    assert network.readout("4-6") == Readout("4-6", (4, 6), 3)
    with pytest.raises(ValueError, match="'short' is not a path"):
        network.readout("short")


def test_outputs_of_every_step_are_the_chains_alone():
    recipe = RECIPES["char-rnn"](depth=3, width=4)
    for method in ("paper", "hbll", "bptt"):
        (readout,) = recipe.objective(method).readouts(recipe.network())
        assert (readout.name, readout.blocks) == ("chain", 8)


def test_a_plain_network_has_one_way_through():
    network = SequentialNetwork(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    (readout,) = Backpropagation().readouts(network)
    assert network.readout("chain") == readout
    assert readout.blocks == 2
    x = torch.randn(5, 3)
    assert network(x, path=readout.path).equal(network[2](network[0](x).relu()))
    with pytest.raises(ValueError, match="'rim' is not a path"):
        network.readout("rim")
    with pytest.raises(ValueError, match="one path, the chain"):
        network(x, path=(1,))
