from dataclasses import dataclass

import pytest
import torch
from torch import nn

from hbll import Tree, TreeNetwork
from hbll.stages import Stages
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
def test_the_first_bad_node_is_the_first_that_was_walked(bad, place):
    reports = {node: Report(NAN if node in bad else 1.0) for node in range(1, 8)}
    assert place_in_loss(Tree(8), reports) == place


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
    stages = Stages(network.blocks, size, "loop")
    assert all_finite(network)
    assert place_in_weights(network, stages) is None
    with torch.no_grad():
        network.get_parameter(parameter).view(-1)[-1] = value
    assert not all_finite(network)
    assert place_in_weights(network, stages) == place


@pytest.mark.parametrize("bad", [None, 1, 5, "embed"])
@pytest.mark.parametrize("size", [1, 3])
def test_the_first_bad_state_of_the_chain_is_found(network, bad, size):
    stages = Stages(network.blocks, size, "loop")
    module = network.embed if bad == "embed" else network.blocks[bad - 1] if bad else None
    if module:
        nn.init.constant_(module.bias, float("inf"))
    expected = "the head" if bad is None else "the embed" if bad == "embed" else f"node {(bad - 1) // size + 1}"
    assert place_in_chain(network, stages, torch.ones(4, 2)) == expected
