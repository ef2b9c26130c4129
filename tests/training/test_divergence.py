from dataclasses import dataclass

import pytest
import torch
from torch import nn

from hbll import Objective, TreeNetwork
from hbll.cuts import SequentialNetwork
from hbll.local.backpropagation import Backpropagation
from hbll.training.divergence import all_finite, place_in_chain, place_in_loss, place_in_weights

NAN = float("nan")


@dataclass
class Report:
    error: float = 0.0
    cosine: float | None = None


@pytest.fixture
def network():
    return TreeNetwork(embed=nn.Linear(2, 2), blocks=[nn.Linear(2, 2) for _ in range(7)], head=nn.Linear(2, 3))


@pytest.mark.parametrize(
    ("bad", "place"),
    [((1, 4, 7), "node 4"), ((1, 2, 6), "node 2"), ((7, 5), "node 5"), ((3,), "node 3"), ((), "the head")],
)
def test_the_first_bad_node_is_the_first_that_was_walked(network, bad, place):
    reports = {node: Report(NAN if node in bad else 1.0) for node in range(1, 8)}
    assert place_in_loss(Objective("paper").layout(network).walk, reports) == place


@pytest.mark.parametrize("value", [NAN, float("inf")])
@pytest.mark.parametrize(
    ("parameter", "size", "place"),
    [
        ("embed.bias", 1, "the embed"),
        ("blocks.4.weight", 1, "node 5"),
        ("blocks.4.weight", 3, "node 2"),
        ("head.weight", 1, "the head"),
    ],
)
def test_a_bad_weight_is_found(network, value, parameter, size, place):
    parts = Objective("paper", stage=size).layout(network).parts
    assert all_finite(network.parameters())
    assert place_in_weights(parts) is None
    with torch.no_grad():
        network.get_parameter(parameter).view(-1)[-1] = value
    assert not all_finite(network.parameters())
    assert place_in_weights(parts) == place


@pytest.mark.parametrize("bad", [None, 1, 5, "embed"])
@pytest.mark.parametrize("size", [1, 3])
def test_the_first_bad_state_of_the_chain_is_found(network, bad, size):
    parts = Objective("bp", stage=size).layout(network).parts
    module = network.embed if bad == "embed" else network.blocks[bad - 1] if bad else None
    if module:
        nn.init.constant_(module.bias, float("inf"))
    expected = "the head" if bad is None else "the embed" if bad == "embed" else f"node {(bad - 1) // size + 1}"
    assert place_in_chain(parts, torch.ones(4, 2)) == expected


def test_a_bad_weight_of_a_plain_network_is_found_by_its_block():
    network = SequentialNetwork(nn.Flatten(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 3))
    parts = Backpropagation().layout(network).parts
    assert place_in_weights(parts) is None
    nn.init.constant_(network[3].bias, NAN)
    assert place_in_weights(parts) == "the head"
    nn.init.constant_(network[1].bias, NAN)
    assert place_in_weights(parts) == "node 1"
