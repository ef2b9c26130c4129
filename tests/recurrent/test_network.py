"""The chain, paths, streaming, padding and export of recurrent networks."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from hbll.models.cells import OneHot
from hbll.recurrent import CELLS, GRU, DepthCells, RecurrentNetwork, SharedCell
from hbll.recurrent.network import resolve
from hbll.recurrent.tree_states import tree_states
from hbll.tree import Tree

INPUTS, WIDTH, CLASSES, BATCH = 2, 5, 3, 4  # those of `problem`


def plain_chain(network, x):
    states = [network.cell.initial(len(x))]
    for t in range(x.shape[1]):
        states.append(network.cell(x[:, t], states[-1]))
    return torch.stack(states[1:], 1)


@pytest.mark.parametrize("length", [1, 2, 7, 8])
def test_the_chain_is_the_cell_step_after_step(problem, length):
    network, x, _ = problem(length)
    states = plain_chain(network, x)
    torch.testing.assert_close(network(x), network.head(network.cell.hidden(states[:, -1])))
    network.every_step = True
    torch.testing.assert_close(network(x), network.head(network.cell.hidden(states)))


def test_streaming_in_pieces_is_the_chain(problem):
    network, x, _ = problem(9)
    whole, last = network.unroll(x)
    state, pieces = None, []
    for a, b in pairwise((0, 1, 4, 9)):
        hidden, state = network.unroll(x[:, a:b], state)
        pieces.append(hidden)
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    torch.testing.assert_close(state, last)


def test_a_list_of_two_is_a_pair(problem):
    network, x, _ = problem(5)
    lengths = torch.tensor([5, 1, 2, 3])
    assert network([x, lengths]).equal(network((x, lengths)))


def test_streams_of_unequal_length_keep_their_state_over_padding(problem):
    network, x, _ = problem(6)
    hidden, last = network.unroll((x, torch.tensor([6, 2, 6, 2])))
    for sequence, begin in ((0, 0), (1, 4)):
        alone, end = network.unroll(x[sequence : sequence + 1, begin:])
        torch.testing.assert_close(hidden[sequence, begin:], alone[0])
        torch.testing.assert_close(last[sequence], end[0])
        assert (hidden[sequence, :begin] == 0).all()


@pytest.mark.parametrize("length", [5, 8])
def test_a_path_is_its_arcs_one_after_the_other(problem, length):
    network, x, _ = problem(length)
    for path in Tree(length).paths():
        state = network.cell.initial(BATCH)
        for a, b in pairwise((0, *path, length)):
            depth = next(d for d in range(9) if 2**d >= b - a)
            side_by_side = torch.cat([torch.zeros(BATCH, (2**depth - (b - a)) * INPUTS), x[:, a:b].flatten(1)], 1)
            state = network.cells.cells[depth](side_by_side, state)
        torch.testing.assert_close(network(x, path=path), network.head(network.cell.hidden(state)))


def test_the_shared_cell_reads_the_mean_of_an_arc(cell_name):
    network = RecurrentNetwork(SharedCell(CELLS[cell_name], INPUTS, WIDTH), nn.Linear(WIDTH, CLASSES))
    x = torch.randn(BATCH, 6, INPUTS)
    state = network.cell.initial(BATCH)
    for a, b in ((0, 3), (3, 4), (4, 6)):
        state = network.cell(x[:, a:b].mean(1), state)
    torch.testing.assert_close(network(x, path="3-4"), network.head(network.cell.hidden(state)))


def test_arcs_of_two_depths_come_back_in_their_order(cell_name):
    cells = DepthCells(CELLS[cell_name], INPUTS, WIDTH, 3)
    x, arcs = torch.randn(8, BATCH, INPUTS), [(0, 1), (1, 4), (4, 5), (5, 8), (2, 4)]
    states = torch.randn(len(arcs), BATCH, cells.chain.state_width)
    together = cells(x, arcs, states)
    alone = torch.cat([cells(x, [arc], state[None]) for arc, state in zip(arcs, states, strict=True)])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("path", ["chain", "tree"])
def test_padding_changes_nothing(problem, path):
    network, x, _ = problem(8)
    lengths = torch.tensor([8, 4, 8, 4])
    padded = x.clone()
    padded[lengths == 4, :4] = 99.0
    found = network((padded, lengths), path=path)
    torch.testing.assert_close(found[lengths == 8], network(x[lengths == 8], path=path))
    # The right half of a tree over 8 is a tree over 4, entered from node 4.
    torch.testing.assert_close(found[lengths == 4], network(x[lengths == 4, 4:], path=path))


def test_named_paths():
    assert resolve(None, 8) == resolve("chain", 8) == (1, 2, 3, 4, 5, 6, 7)
    assert resolve("tree", 8) == resolve("rim", 8) == resolve(3, 8) == (4, 6, 7)
    assert resolve("4-6", 8) == resolve([4, 6], 8) == (4, 6)
    assert resolve("chain", 1) == ()


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_exported_networks_give_the_same_numbers(kind):
    network = RecurrentNetwork(DepthCells(CELLS[kind], INPUTS, WIDTH, 2), nn.Linear(WIDTH, CLASSES))
    x = torch.randn(BATCH, 6, INPUTS)
    hidden, last = network.unroll(x)
    theirs, _ = network.export_sequence()(x)
    torch.testing.assert_close(theirs, hidden)
    cell, state = network.export_cell(), None
    for t in range(6):
        state = cell(x[:, t], state)
    torch.testing.assert_close(torch.cat(state, 1) if kind == "lstm" else state, last)


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_what_is_exported_keeps_its_precision(kind):
    torch.set_default_dtype(torch.float32)
    network = RecurrentNetwork(DepthCells(CELLS[kind], INPUTS, WIDTH, 2), nn.Linear(WIDTH, CLASSES)).double()
    torch.nn.init.normal_(network.cell.weight_hh)
    assert network.export_sequence().weight_hh_l0.equal(network.cell.weight_hh)
    assert network.export_cell().weight_hh.equal(network.cell.weight_hh)


def test_symbols_are_of_the_networks_precision():
    torch.set_default_dtype(torch.float32)
    network = RecurrentNetwork(DepthCells(GRU, 5, WIDTH, 2), nn.Linear(WIDTH, 5), embed=OneHot(5)).double()
    assert network(torch.tensor([[0, 4, 2]])).dtype == torch.float64


def test_an_elman_cell_cannot_be_exported():
    network = RecurrentNetwork(DepthCells(CELLS["elman"], INPUTS, WIDTH, 1), nn.Linear(WIDTH, CLASSES))
    with pytest.raises(ValueError, match="no recurrent network like Elman"):
        network.export_cell()


@pytest.mark.parametrize("length", [5, 8])
def test_no_state_sees_the_future(problem, length):
    network, x, _ = problem(length)
    x.requires_grad_()
    hidden, _ = network.unroll(x)
    for t in range(length):
        (reach,) = torch.autograd.grad(hidden[:, t].square().sum(), x, retain_graph=True)
        assert (reach[:, t + 1 :] == 0).all()
        assert (reach[:, : t + 1] != 0).any(-1).all()
    steps = x.transpose(0, 1)
    for a in range(length):
        for b in range(a + 1, length + 1):
            if (b - a - 1).bit_length() < len(network.cells.cells):
                end = network.cells(steps, [(a, b)], network.cell.initial(BATCH)[None])
                (reach,) = torch.autograd.grad(end.square().sum(), x)
                assert set((reach != 0).any(0).any(-1).nonzero().flatten().tolist()) == set(range(a, b))


@pytest.mark.parametrize("kind", [DepthCells, SharedCell])
@pytest.mark.parametrize("length", [5, 8])
def test_another_input_leaves_every_state_before_it_as_it_was(cell_name, kind, length):
    options = {"depths": 3} if kind is DepthCells else {}
    cells = kind(CELLS[cell_name], INPUTS, WIDTH, **options)
    network = RecurrentNetwork(cells, nn.Linear(WIDTH, CLASSES))

    def states(x):
        """By path and time: of the chain, of every path through the tree, and of the tree itself."""
        found = {("chain", t + 1): state for t, state in enumerate(network.unroll(x)[0].unbind(1))}
        found |= {("tree", t + 1): state for t, state in enumerate(tree_states(cells, x.transpose(0, 1)))}
        for path in Tree(length).paths():
            state = cells.chain.initial(BATCH)
            for a, b in pairwise((0, *path)):
                state = cells(x.transpose(0, 1), [(a, b)], state[None])[0]
                found[path, b] = state
        return found

    x = torch.randn(BATCH, length, INPUTS)
    before = states(x)
    for t in range(length):
        other = x.clone()
        other[:, t] += 1.0
        for (path, time), state in states(other).items():
            assert state.equal(before[path, time]) == (time <= t)


class TestBadInput:
    def test_sequences(self):
        network = RecurrentNetwork(DepthCells(GRU, 2, 3, 2), nn.Linear(3, 2))
        with pytest.raises(ValueError, match="none of them 0"):
            network(torch.zeros(4, 0, 2))
        with pytest.raises(ValueError, match="chunks of width 2; got 3"):
            network(torch.zeros(4, 5, 3))
        with pytest.raises(ValueError, match="not a number"):
            network(torch.full((4, 5, 2), torch.nan))

    def test_states(self):
        network = RecurrentNetwork(DepthCells(GRU, 2, 3, 2), nn.Linear(3, 2))
        for state in (torch.zeros(4, 2), torch.zeros(1, 3)):
            with pytest.raises(ValueError, match=r"4 sequences go on from states \(4, 3\)"):
                network.unroll(torch.zeros(4, 5, 2), state)

    def test_lengths(self):
        network = RecurrentNetwork(DepthCells(GRU, 2, 3, 2), nn.Linear(3, 2))
        for lengths in ([0, 3], [1, 6], [1]):
            with pytest.raises(ValueError, match="each from 1 to 5"):
                network((torch.zeros(2, 5, 2), torch.tensor(lengths)))

    def test_batches(self):
        network, x = RecurrentNetwork(DepthCells(GRU, 2, 3, 2), nn.Linear(3, 2)), torch.zeros(2, 5, 2)
        for batch in ((x,), (x, x, x), x.numpy(), None):
            with pytest.raises(ValueError, match="or a pair of them and their lengths; got a"):
                network(batch)

    def test_paths(self):
        network = RecurrentNetwork(DepthCells(GRU, 2, 3, 1), nn.Linear(3, 2))
        with pytest.raises(ValueError, match="no arc"):
            network(torch.zeros(2, 4, 2), path="1-3")
        with pytest.raises(ValueError, match="longer than 2 chunks"):
            network(torch.zeros(2, 4, 2), path="tree")
        with pytest.raises(ValueError, match="one path"):
            network(torch.zeros(2, 1, 2), path="tree")
        every = RecurrentNetwork(DepthCells(GRU, 2, 3, 2), nn.Linear(3, 2), every_step=True)
        with pytest.raises(ValueError, match="only the chain"):
            every(torch.zeros(2, 4, 2), path="tree")
