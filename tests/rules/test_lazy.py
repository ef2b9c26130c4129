"""Modules that wait for shapes. Oracles: the rule whose modules were there from the start, and an uninterrupted run."""

import copy

import pytest
import torch
from tests.networks import CLASSES, WIDTH, Transformer, convolutional, residual, transformer
from torch import nn
from torch.nn.parameter import UninitializedParameter

from hbll import Chain, make_rule


def pooled():
    """Tokens with one label for all of them."""

    class Mean(nn.Linear):
        def forward(self, state):
            return super().forward(state.mean(1))

    torch.manual_seed(0)
    network = Chain(nn.Embedding(9, WIDTH), [Transformer() for _ in range(3)], Mean(WIDTH, CLASSES)).double()
    return network, torch.randint(9, (4, 7)), torch.arange(4) % CLASSES


def dropping():
    network, x, y = residual(4)
    network.blocks[1] = nn.Sequential(network.blocks[1], nn.Dropout(0.5))
    return network, x, y


NETWORKS = {
    "vectors": lambda: residual(4),
    "images": lambda: convolutional(4),
    "tokens": lambda: transformer(4),
    "pooled tokens": pooled,
}
EVERY_NETWORK = pytest.mark.parametrize("case", NETWORKS)
EVERY_RULE = pytest.mark.parametrize(
    ("name", "options"),
    [("dgl", {}), ("dgl", {"hidden": 0}), ("predsim", {}), ("bll", {}), ("bll", {"feedback": "random"}), ("dfa", {})],
)


def train(rule, optimizer, x, y, steps=5):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(rule.backward(x, y).loss)
        optimizer.step()
    return losses


@EVERY_NETWORK
@pytest.mark.parametrize(("name", "options"), [("dgl", {}), ("predsim", {}), ("bll", {})])
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_an_optimizer_made_before_the_first_step_trains_them(case, name, options, way):
    network, x, y = NETWORKS[case]()
    rule = make_rule(name, network, **options)
    waiting = list(rule.beside.parameters())
    assert waiting
    assert all(isinstance(p, UninitializedParameter) for p in waiting)
    optimizer = torch.optim.AdamW(rule.parameters(), lr=1e-2)
    start = None
    for _ in range(3):
        optimizer.zero_grad()
        rule.backward(x, y) if way == "backward" else rule(x, y).loss.backward()
        start = start or [p.detach().clone() for p in rule.beside.parameters()]
        optimizer.step()
    beside = list(rule.beside.parameters())
    assert all(any(p is own for own in waiting) for p in beside)
    assert all(p.dtype == torch.float64 and type(p) is nn.Parameter for p in beside)
    assert not any(p.equal(before) for p, before in zip(beside, start, strict=True))
    # Of dgl, the convolutions and norms that only images need, of two stages.
    spare = [p for p in waiting if not any(p is own for own in beside)]
    assert len(spare) == (2 * 9 if name == "dgl" and case != "images" else 0)
    assert all(p.numel() == 0 and p.grad is None for p in spare)


@EVERY_NETWORK
@EVERY_RULE
def test_they_are_those_that_an_example_gives(case, name, options):
    network, x, y = NETWORKS[case]()
    rule = make_rule(name, copy.deepcopy(network), example=x, **options)
    lazy = make_rule(name, network, **options)
    lazy.load_state_dict(rule.state_dict())
    optimizers = [torch.optim.AdamW(one.parameters(), lr=1e-2) for one in (rule, lazy)]
    assert train(lazy, optimizers[1], x, y) == train(rule, optimizers[0], x, y)
    ours, theirs = lazy.state_dict(), rule.state_dict()
    assert list(ours) == list(theirs)
    assert all(ours[key].equal(theirs[key]) for key in theirs)
    for k in range(1, 4):
        pairs = zip(lazy.own(k), rule.own(k), strict=True)
        assert all(str(mine) == str(other) for mine, other in pairs)


@EVERY_RULE
def test_they_are_made_once_and_draw_what_an_example_draws(name, options):
    network, x, y = residual(4)
    torch.manual_seed(1)
    expected = dict(make_rule(name, copy.deepcopy(network), example=x, **options).named_parameters())
    torch.manual_seed(1)
    rule = make_rule(name, network, **options)
    rule(x, y)
    rule.build(x)
    assert all(value.equal(expected[key]) for key, value in rule.named_parameters())


@EVERY_RULE
def test_a_run_that_is_resumed_goes_on_as_if_it_had_not_stopped(name, options):
    """With an optimizer made before the first step, and dropout, so that random numbers matter."""
    network, x, y = dropping()
    rule = make_rule(name, network, **options)
    optimizer = torch.optim.AdamW(rule.parameters(), lr=1e-2)
    train(rule, optimizer, x, y)
    saved = copy.deepcopy((rule.state_dict(), optimizer.state_dict(), torch.get_rng_state()))
    expected = train(rule, optimizer, x, y)
    other = make_rule(name, dropping()[0], **options)
    resumed = torch.optim.AdamW(other.parameters(), lr=1e-2)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    torch.set_rng_state(saved[2])
    assert train(other, resumed, x, y) == expected
    for ours, theirs in zip(other.state_dict().values(), rule.state_dict().values(), strict=True):
        assert ours.equal(theirs)


def test_weights_that_were_loaded_are_copies():
    network, x, y = residual(4)
    rule = make_rule("predsim", network, example=x)
    lazy = make_rule("predsim", copy.deepcopy(network))
    lazy.load_state_dict(rule.state_dict())
    before = [p.detach().clone() for p in rule.beside.parameters()]
    with torch.no_grad():
        for p in rule.beside.parameters():
            p.zero_()
    lazy(x, y)
    assert all(p.equal(expected) for p, expected in zip(lazy.beside.parameters(), before, strict=True))


def test_before_they_are_there_they_are_not_saved():
    rule = make_rule("dgl", residual(4)[0])
    state = rule.state_dict()
    assert all(key.startswith("network.") for key in state)
    other = make_rule("dgl", residual(4)[0])
    other.load_state_dict(state)
    other(*residual(4)[1:])


@EVERY_RULE
def test_what_happens_to_the_rule_before_holds_after(name, options):
    network, x, y = residual(4)
    rule = copy.deepcopy(make_rule(name, network.float(), **options).double())
    rule.beside.requires_grad_(False)
    assert all(p.dtype == torch.float64 for p in rule.beside.parameters())
    rule.backward(x, y)
    assert not any(p.requires_grad for p in rule.beside.parameters())
    assert all(v.dtype == torch.float64 for v in rule.state_dict().values() if v.is_floating_point())


def test_every_stage_may_have_an_optimizer():
    network, x, y = residual(4)
    rule = make_rule("predsim", network)
    optimizers = [torch.optim.SGD([p for m in rule.own(k) for p in m.parameters()], lr=0.1) for k in (1, 2, 3)]
    before = None
    for _ in range(2):
        rule.backward(x, y)
        before = before or [p.detach().clone() for p in rule.parameters()]
        for optimizer in optimizers:
            optimizer.step()
    assert not any(p.equal(old) for p, old in zip(rule.parameters(), before, strict=True))


def test_making_them_leaves_no_trace_in_the_network():
    network = Chain(
        nn.Identity(), [nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)), nn.Linear(6, 4)], nn.Linear(4, 3)
    )
    rule = make_rule("predsim", network, example=torch.randn(6, 5))
    assert [rule.auxiliary(k)[0].in_features for k in (1, 2)] == [6, 4]
    assert network.blocks[0][1].num_batches_tracked == 0
    assert network.training
    assert all(p.grad is None for p in rule.parameters())


def test_under_autocast_they_have_the_precision_of_weights():
    network, x, y = convolutional(4)
    rule = make_rule("dgl", network.float())
    with torch.autocast("cpu", torch.bfloat16):
        rule.backward(x.float(), y)
    assert {p.dtype for p in rule.parameters()} == {torch.float32}
    half = make_rule("dgl", copy.deepcopy(network).bfloat16(), example=x.bfloat16())
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
