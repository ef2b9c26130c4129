import pytest
import torch
from torch import nn

from hbll import Chain, Step, make_rule
from hbll.rules import RULES
from hbll.train import DivergenceWarning, fit
from hbll.train.divergence import Growth, all_finite, place_in_step, place_in_weights

NAN = float("nan")

X, Y = torch.ones(4, 3), torch.tensor([0, 1, 2, 0])


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Chain(embed=nn.Linear(3, 2), blocks=[nn.Linear(2, 2) for _ in range(7)], head=nn.Linear(2, 3))


PLACES = [
    ("embed.bias", "the embed"),
    ("blocks.0.bias", "block 1"),
    ("blocks.4.weight", "block 5"),
    ("head.bias", "the head"),
]


@pytest.mark.parametrize("value", [NAN, float("inf")])
@pytest.mark.parametrize(("parameter", "place"), PLACES)
@pytest.mark.parametrize("name", ["paper", "bp"])
def test_a_bad_weight_is_found(network, value, parameter, place, name):
    rule = make_rule(name, network)
    assert all_finite(network.parameters())
    assert place_in_weights(rule) is None
    with torch.no_grad():
        network.get_parameter(parameter).view(-1)[-1] = value
    assert not all_finite(network.parameters())
    assert place_in_weights(rule) == place


@pytest.mark.parametrize(("parameter", "place"), PLACES)
@pytest.mark.parametrize("name", RULES)
def test_the_first_bad_output_along_the_chain_is_found(network, parameter, place, name):
    rule = make_rule(name, network, X)
    for _ in range(14):  # a full pipeline, there and back
        rule.backward(X, Y)
    assert place_in_step(rule, X, Y) is None
    nn.init.constant_(network.get_parameter(parameter), float("inf"))
    steps = 0
    while not (found := place_in_step(rule, X, Y)) and steps < 7:  # until the batch of a pipeline reaches the head
        rule.backward(X, Y)
        steps += 1
    assert found == place


def test_a_look_leaves_random_numbers_and_what_is_kept_as_they_were(network):
    network.blocks[3] = nn.Sequential(nn.Dropout(0.5), network.blocks[3])
    ours, theirs = (make_rule("stream", network) for _ in range(2))
    torch.manual_seed(1)
    expected = [theirs(X, Y).loss.item() for _ in range(9)]
    torch.manual_seed(1)
    found = []
    for _ in range(9):
        assert place_in_step(ours, X, Y) is None
        found.append(ours(X, Y).loss.item())
    assert found == expected


def test_a_stage_whose_loss_is_bad_on_states_that_are_not_the_chains_is_named(network):
    # The tree's root, block 4, sees the embedded input, here 0 of one sample; in the chain it sees what block 3 made of it.
    nn.init.zeros_(network.embed.bias)
    x = torch.cat([torch.zeros(1, 3), X[1:]])
    network.blocks[3].register_forward_hook(lambda module, given, output: output / given[0])
    rule = make_rule("paper", network, engine="loop")
    assert place_in_step(rule, x, Y) == "block 4"


def test_a_bad_batch_in_flight_is_found_by_its_stage(network):
    rule = make_rule("stream", network, stage=2)
    rule.backward(torch.full((4, 3), NAN), Y)
    assert place_in_step(rule, X, Y) == "stage 2 (blocks 3-4)"


def looked_at(*losses):
    growth = Growth()
    for loss in losses:
        growth.add([Step(loss=torch.tensor(loss))])
    growth.look()
    return growth


@pytest.mark.parametrize("losses", [(), (2.3, 2000.0), (1e-6, 999.0), (1e6, 9e8), (-3.0, -2.0), (0.0, 0.0)])
def test_a_loss_that_does_not_grow_a_thousandfold_is_no_divergence(losses):
    looked_at(*losses)


@pytest.mark.parametrize(
    "losses", [(2.3, 3000.0, 1.0), (1e-6, 1e4), (1e6, 2e9), (1.0, NAN, 1.0), (float("inf"),), (NAN, 2.0)]
)
def test_a_loss_that_grows_without_bound_is_told_once(losses):
    with pytest.warns(DivergenceWarning, match=f"within {len(losses)} steps the loss went from"):
        growth = looked_at(*losses)
    growth.look()


@pytest.mark.parametrize("rate", [0.5, 2.5])
def test_a_training_that_diverges_is_told(rate):
    # Of the loss u^2 / 2 a step leaves u (1 - rate): 0.5^n goes to 0, 1.5^n to infinity.
    embed = nn.Linear(1, 1, bias=False)
    nn.init.ones_(embed.weight)
    network = Chain(embed, [nn.Identity()], nn.Identity())
    rule = make_rule("bp", network, loss=lambda output, y: output.square().sum(-1) / 2)
    batches = [(torch.ones(1, 1), torch.zeros(1, 1))] * 60
    optimizer = torch.optim.SGD(rule.parameters(), lr=rate)
    if rate < 2:
        assert fit(rule, batches, optimizer).losses[0] < 1
    else:
        with pytest.warns(DivergenceWarning, match=r"the loss went from 0\.5 to "):
            fit(rule, batches, optimizer)
