"""Backpropagation as a rule. Oracles: autograd through the whole network, and the products that really run."""

import pytest
import torch
import torch.nn.functional as F
from tests.networks import CLASSES, KINDS, WIDTH, assert_equal_gradients, gradients, residual, transformer
from tests.oracles.meter import countable, measure
from torch import nn

from hbll import Chain, make_rule


def exact(network, x, y, path=None):
    return F.cross_entropy(network(x, path).flatten(0, -2), y.flatten())


def through_backward(rule, x, y):
    rule.zero_grad()
    step = rule.backward(x, y)
    return step, {name.removeprefix("network."): p.grad for name, p in rule.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", [None, 2, "block-4", "rim", [1, 2, 4, 6]])
def test_it_is_autograd_through_the_network_or_a_path(kind, path):
    network, x, y = KINDS[kind][0]()
    rule = make_rule("bp", network, path=path)
    expected = exact(network, x, y, path)
    step = rule(x, y)
    assert step.loss.item() == step.label_loss.item() == pytest.approx(expected.item(), rel=1e-14)
    assert step.reports[1].error == step.loss.item()
    assert_equal_gradients(gradients(rule, step.loss), gradients(network, expected))
    step, found = through_backward(rule, x, y)
    assert step.loss.item() == pytest.approx(expected.item(), rel=1e-14)
    trained = [name for name, g in gradients(network, exact(network, x, y, path)).items() if g.any()]
    assert set(trained) == {name for name, g in found.items() if g.any()}
    assert_equal_gradients(found, {n: g for n, g in gradients(network, exact(network, x, y, path)).items() if g.any()})


def test_states_may_change_shape_along_the_chain_and_not_along_a_path():
    torch.manual_seed(0)
    network = Chain(nn.Identity(), [nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 6)], nn.Linear(6, CLASSES)).double()
    x, y = torch.randn(4, 5, dtype=torch.float64), torch.arange(4) % CLASSES
    rule = make_rule("bp", network)
    assert_equal_gradients(gradients(rule, rule(x, y).loss), gradients(network, exact(network, x, y)))
    with pytest.raises(ValueError, match=r"block 1 changes the state's shape from \(4, 5\) to \(4, 4\)"):
        make_rule("bp", network, path=[1, 2])(x, y)


@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_the_rim_is_trained_beside_it(weight):
    network, x, y = residual(8)
    state, exits = network.embed(x), []
    for n in network.tree.rim:
        state = network.blocks[n - 1](state)
        exits.append(F.cross_entropy(network.head(state), y))
    expected = exact(network, x, y) + weight * sum(exits) / len(exits)
    rule = make_rule("bp", network, rim=weight)
    step = rule(x, y)
    torch.testing.assert_close(step.loss, expected)
    torch.testing.assert_close(step.label_loss, exact(network, x, y))
    assert_equal_gradients(gradients(rule, step.loss), gradients(network, expected))


def test_tied_weights_get_what_autograd_gives_them():
    network, x, _ = transformer(4)
    network.head = nn.Linear(WIDTH, 11, bias=False).double()
    network.head.weight = network.embed.weight
    rule, y = make_rule("bp", network), torch.randint(11, x.shape)
    assert_equal_gradients(gradients(rule, rule(x, y).loss), gradients(network, exact(network, x, y)))


def test_a_context_reaches_every_block_and_the_head():
    class Embed(nn.Linear):
        def forward(self, x):
            return super().forward(x), {"scale": x.mean(1, keepdim=True), "shift": self.bias}

    class Block(nn.Linear):
        def forward(self, state, scale):
            return state + scale * super().forward(state)

    class Head(nn.Linear):
        def forward(self, state, shift):
            return super().forward(state + shift)

    torch.manual_seed(0)
    network = Chain(Embed(5, WIDTH), [Block(WIDTH, WIDTH) for _ in range(3)], Head(WIDTH, CLASSES)).double()
    x, y = torch.randn(4, 5, dtype=torch.float64), torch.arange(4) % CLASSES
    rule = make_rule("bp", network)
    assert_equal_gradients(gradients(rule, rule(x, y).loss), gradients(network, exact(network, x, y)))


@pytest.mark.parametrize("nodes", [2, 3, 8, 13])
def test_counts_are_what_really_runs(nodes):
    counted, measured = measure(make_rule("bp", countable(nodes)))
    assert counted == measured == (3 * (nodes - 1), 2 * (nodes - 1))


@pytest.mark.parametrize("frozen", ["embed", "head", "blocks.0", "blocks.1"])
def test_frozen_parts_save_their_products(frozen):
    network = countable(8)
    network.get_submodule(frozen).requires_grad_(False)
    counted, measured = measure(make_rule("bp", network))
    assert counted == measured


@pytest.mark.parametrize(("path", "blocks"), [("block-4", 1), ("4", 4), ("4-6", 2), ("rim", 3), ([1, 2, 4, 6], 4)])
def test_a_path_costs_its_blocks(path, blocks):
    counted, measured = measure(make_rule("bp", countable(8), path=path))
    assert counted == measured == (3 * blocks, 2 * blocks)


def test_a_diagnosis_finds_no_difference():
    network, x, y = residual(4)
    assert make_rule("bp", network).diagnose(x, y)[1].cosine == pytest.approx(1.0)
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"rim": -1.0}, "rim must not be negative; got -1.0"),
        ({"path": "9"}, "9"),
        ({"stage": 2}, "unknown option of bp 'stage'"),
    ],
)
def test_what_cannot_be_is_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_rule("bp", residual(4)[0], **options)
