"""Cuts. Oracles: the network itself, all ways to cut by brute force, and the products that a walk back really makes."""

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hbll import TreeNetwork
from hbll.cuts import SequentialNetwork, cut, parts
from hbll.network import evaluating


def plain(*sizes):
    """Linear layers with so many units, a ReLU between any two, and a head."""
    layers = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return SequentialNetwork(*layers, nn.Linear(sizes[-1], 3))


def names(segments):
    return [[part.name for part in segment.parts] for segment in segments]


def test_parts_of_a_tree_network_are_embed_blocks_and_head():
    network = TreeNetwork(nn.Linear(2, 4), [nn.Linear(4, 4), nn.Identity()], nn.Linear(4, 3))
    found = parts(network)
    assert [(part.name, part.cost) for part in found] == [("embed", 0), ("block 1", 1), ("block 2", 1), ("head", 0)]
    assert [part.module for part in found] == [network.embed, *network.blocks, network.head]


def test_parts_of_a_sequence_cost_something_if_they_have_parameters():
    found = parts(plain(2, 4))
    assert [(part.name, part.cost) for part in found] == [("layer 1", 1), ("layer 2", 0), ("head", 0)]


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match="a Linear has no parts to cut"):
        parts(nn.Linear(2, 3))
    with pytest.raises(ValueError, match="at least one module before its head"):
        SequentialNetwork(nn.Linear(2, 3))


@given(st.integers(1, 6), st.data())
def test_segments_are_the_network_and_keep_activations_with_their_layer(layers, data):
    network = plain(*[2] * (layers + 1))
    *body, head = parts(network)
    count = data.draw(st.none() | st.integers(1, layers))
    segments = cut(body, count, data.draw(st.sampled_from(["count", "parameters"])))
    assert [part for segment in segments for part in segment.parts] == body
    assert len(segments) == (layers if count is None else count)
    assert all(isinstance(segment.parts[-1].module, nn.ReLU) for segment in segments)
    state = x = torch.randn(3, 2)
    for segment in segments:
        state = segment(state)
    assert head.module(state).equal(network(x))


@given(st.integers(1, 12), st.data())
def test_a_cut_by_count_is_even(layers, data):
    count = data.draw(st.integers(1, layers))
    *body, _ = parts(nn.Sequential(*(nn.Linear(1, 1) for _ in range(layers + 1))))
    sizes = [len(segment.parts) for segment in cut(body, count)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1


@given(st.lists(st.integers(1, 9), min_size=2, max_size=7), st.data())
def test_no_other_cut_has_a_smaller_largest_block(sizes, data):
    *body, _ = parts(plain(*sizes))
    layers = len(sizes) - 1
    count = data.draw(st.integers(1, layers))
    weights = [(before + 1) * after for before, after in pairwise(sizes)]
    best = min(
        max(sum(weights[a:b]) for a, b in pairwise((0, *places, layers)))
        for places in combinations(range(1, layers), count - 1)
    )
    segments = cut(body, count, "parameters")
    assert max(sum(p.numel() for p in segment.parameters) for segment in segments) == best


def test_a_cut_by_hand_is_where_it_is_wanted():
    *body, _ = parts(plain(2, 3, 4))
    assert names(cut(body, [1])) == [["layer 1"], ["layer 2", "layer 3", "layer 4"]]
    for places in ([0], [4], [2, 1], [2, 2]):
        with pytest.raises(ValueError, match=r"after parts 1\.\.3, in rising order"):
            cut(body, places)


@pytest.mark.parametrize("count", [0, 3])
def test_there_are_no_more_blocks_than_layers(count):
    *body, _ = parts(plain(2, 3, 4))
    with pytest.raises(ValueError, match=rf"cut it into 1\.\.2 blocks, not {count}"):
        cut(body, count)


def test_an_unknown_balance_is_refused():
    *body, _ = parts(plain(2, 3, 4))
    with pytest.raises(ValueError, match="unknown balance 'size'"):
        cut(body, 2, "size")


@pytest.mark.parametrize("frozen", [(), (0,), (0, 2), (4,), (0, 2, 4)])
def test_a_walk_back_makes_the_products_that_autograd_makes(frozen):
    network = plain(5, 5, 5, 5)
    for i in frozen:
        network[i].requires_grad_(False)
    *body, _ = parts(network)
    (segment,) = cut(body, 1)
    output = segment(torch.randn(2, 5))
    # Every product for a weight is one leaf of the graph, every product for an input an edge from a layer to one before.
    weights = sum(network[i].weight.requires_grad for i in (0, 2, 4))
    edges, pending = 0, [output.grad_fn]
    while pending:
        function = pending.pop()
        if function is None:
            continue
        children = [child for child, _ in function.next_functions]
        if type(function).__name__ == "AddmmBackward0":
            edges += children[1] is not None
        pending += children
    assert segment.cost == 3
    assert segment.backward_work == weights + edges
    # One after the other: all products for inputs, and that for the weight at the end of them.
    assert segment.backward_span == edges + (weights > 0)


def test_a_slice_is_a_plain_sequence():
    network = plain(4, 5)
    assert type(network[:1]) is nn.Sequential
    assert network[:1][0] is network[0]
    assert network[-1] is list(network)[-1]


def test_evaluation_mode_is_left_as_it_was_found():
    network = SequentialNetwork(nn.BatchNorm1d(2), nn.Dropout(), nn.Linear(2, 2))
    network[1].eval()
    with evaluating(network):
        assert not any(module.training for module in network.modules())
        network(torch.randn(4, 2))
    assert [module.training for module in network] == [True, False, True]
    assert network[0].num_batches_tracked == 0
