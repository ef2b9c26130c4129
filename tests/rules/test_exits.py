"""Readouts of stages. Oracle: the stages by hand, read by what the rule trains for them."""

import pytest
import torch
from tests.networks import CLASSES, INPUTS, convolutional, masked, residual, transformer
from torch import nn

import hbll
from hbll.rules import RULES, make_rule


def states(network, x):
    """The states after 1, 2, .. blocks."""
    found, (state, context) = [], network.embedded(x)
    for block in network.blocks:
        state = block(state, **context)
        found.append(state)
    return found


def own_heads(rule):
    """The heads of the stages' own readouts, away from the network's, which they are copies of."""
    heads = [readout.head for readout in rule.own_readouts]
    with torch.no_grad():
        for parameter in (p for head in heads for p in head.parameters()):
            parameter.add_(torch.randn_like(parameter))
    return heads


def check(rule, x, expected):
    """Every stage's readout but the last, and the last one's, gives what is expected of x."""
    names = [readout.name for readout in rule.exits]
    assert names == [f"stage-{k}" for k in range(1, len(rule.stages) + 1)]
    assert [rule.readout(name) for name in names[-1:]] == rule.exits[-1:]
    for readout, logits in zip(rule.exits, [*expected, rule.network(x)], strict=True):
        torch.testing.assert_close(rule.network(x, path=readout), logits)


@pytest.mark.parametrize("states_", ["chain", "stream"])
def test_greedy_reads_by_heads_of_its_own(states_):
    network, x, _ = residual(7)
    rule = make_rule("greedy", network, stage=(1, 2, 3), states=states_)
    after, heads = states(network, x), own_heads(rule)
    check(rule, x, [heads[0](after[0]), heads[1](after[2])])
    assert [(readout.path, readout.blocks) for readout in rule.exits] == [
        ((1,), 1),
        ((1, 2, 3), 3),
        ((1, 2, 3, 4, 5, 6), 6),
    ]


def test_the_shape_may_change_on_the_way():
    torch.manual_seed(0)
    blocks = [nn.Linear(before, after) for before, after in ((8, 6), (6, 5), (5, 4))]
    network, x = hbll.Chain(nn.Linear(INPUTS, 8), blocks, nn.Linear(4, CLASSES)), torch.randn(3, INPUTS)
    rule = make_rule("greedy", network)
    heads = [nn.Linear(6, CLASSES), nn.Linear(5, CLASSES)]
    for readout, head in zip(rule.own_readouts, heads, strict=True):
        readout.head = head
    check(rule, x, [head(state) for head, state in zip(heads, states(network, x), strict=False)])


@pytest.mark.parametrize("copies", [False, True])
def test_stream_reads_through_its_spine(copies):
    network, x, _ = residual(8)
    rule = make_rule("stream", network, stage=(2, 1, 1, 1, 2), copies=copies)
    blocks, after = network.blocks, states(network, x)
    # To the stages 1, 3, 7, .. on, of which the last blocks are passed, and to the last.
    spines = [(3, 5, 7), (4, 7), (5, 7), (7,)]
    expected = []
    for end, through in zip((2, 3, 4, 5), spines, strict=True):
        state = after[end - 1]
        for n in through:
            state = blocks[n - 1](state)
        expected.append(network.head(state))
    check(rule, x, expected)
    # Copies are equal at first, and are no blocks of the network.
    assert rule.exits[0].path == ((1, 2) if copies else (1, 2, 3, 5, 7))
    assert [readout.blocks for readout in rule.exits] == [5, 5, 6, 6, 7]


def test_a_spine_may_pass_several_blocks_of_a_stage():
    rule = make_rule("stream", residual(8)[0], stage=(2, 2, 3), readout_depth=2)
    assert [readout.path for readout in rule.exits] == [(1, 2, 3, 4, 6, 7), (1, 2, 3, 4, 6, 7), (1, 2, 3, 4, 5, 6, 7)]


def test_solo_reads_by_blocks_of_its_own():
    network, x, _ = residual(5)
    rule = make_rule("solo", network, stage=2)
    (own,) = rule.own_readouts
    own_heads(rule)
    state = states(network, x)[1]
    for block in own.blocks:
        state = block(state)
    check(rule, x, [own.head.temperature * own.head.head(state)])
    assert [readout.blocks for readout in rule.exits] == [4, 4]


def test_a_context_reaches_blocks_and_heads():
    network, x, _ = masked(4)
    rule = make_rule("greedy", network)
    mask = network.embedded(x)[1]["mask"]
    check(rule, x, [h(s, mask) for h, s in zip(own_heads(rule), states(network, x), strict=False)])


@pytest.mark.parametrize("name", ["dgl", "predsim"])
@pytest.mark.parametrize("make", [residual, convolutional, transformer])
def test_local_rules_read_by_their_classifiers(name, make):
    network, x, y = make(4)
    rule = make_rule(name, network, example=x)
    for _ in range(3):
        rule(x, y).loss.backward()
    with torch.no_grad():
        for parameter in rule.beside.parameters():
            parameter.sub_(0.1 * (parameter.grad if parameter.grad is not None else 0))
    rule.eval()
    classify = [rule.auxiliary(k)[-1] for k in (1, 2)]
    if y.ndim == 2:
        expected = [torch.stack([c(s) for s in state]) for c, state in zip(classify, states(network, x), strict=False)]
    else:
        expected = [c(state) for c, state in zip(classify, states(network, x), strict=False)]
    assert expected[0].abs().max() > 0
    check(rule, x, expected)


def test_a_classifier_reads_a_sample_the_same_in_any_company():
    network, x, y = convolutional(4)
    rule = make_rule("dgl", network, example=x)
    rule(x, y)
    rule.eval()
    together = network(x, path=rule.exits[0])
    torch.testing.assert_close(torch.cat([network(one[None], path=rule.exits[0]) for one in x]), together)


@pytest.mark.parametrize("name", ["greedy", "stream", "solo", "dgl", "predsim"])
def test_they_lie_in_a_state_dict(name):
    (network, x, y), (other, _, _) = residual(4), residual(4, seed=1)
    rule, copy = make_rule(name, network, example=x), make_rule(name, other)
    rule(x, y)
    copy.load_state_dict(rule.state_dict())
    copy.build(x)
    rule.eval()
    copy.eval()
    for ours, theirs in zip(rule.exits, copy.exits, strict=True):
        assert network(x, path=ours).equal(other(x, path=theirs))


@pytest.mark.parametrize("name", sorted(set(RULES) - {"greedy", "stream", "solo", "dgl", "predsim"}))
def test_other_rules_have_none(name):
    network, x, _ = residual(4)
    rule = make_rule(name, network, example=x)
    assert rule.exits == []
    with pytest.raises(ValueError, match="there is no stage-1: the rule trains no readouts of stages, name a path"):
        rule.readout("stage-1")
    assert rule.readout("rim") == network.readout("rim")


def test_what_is_not_there_is_told():
    network, x, _ = residual(4)
    with pytest.raises(ValueError, match=r"unknown readout 'stage-4'; did you mean stage-[123]"):
        make_rule("greedy", network).readout("stage-4")
    rule = make_rule("dgl", network)
    with pytest.raises(ValueError, match=r"wait for the shapes of states: call rule.build\(x\)"):
        rule.readout("stage-1")
    rule.build(x)
    assert len(rule.exits) == 3
