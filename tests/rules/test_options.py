"""The options of rules: whatever cannot be is said in one sentence, before anything is trained."""

import copy

import pytest
import torch
from tests.networks import mlp
from torch import nn

from hbll import Chain, make_rule
from hbll.losses import cross_entropy
from hbll.rules import RULES

LOCAL = ["dgl", "predsim", "ff", "cff", "dfa", "bll"]


def network():
    return mlp(8)[0]


def test_the_table():
    assert list(RULES) == ["paper", "tree", "scan", "stream", "greedy", "solo", "pipeline", "2bw", "bp", *LOCAL]


@pytest.mark.parametrize(("typed", "meant"), [("papper", "paper"), ("tre", "tree"), ("bpp", "bp"), ("steam", "stream")])
def test_the_nearest_rule_is_named(typed, meant):
    with pytest.raises(ValueError, match=f"^unknown rule '{typed}'; did you mean {meant}"):
        make_rule(typed, network())


def test_all_rules_are_listed_if_none_is_near():
    with pytest.raises(ValueError, match=f"^unknown rule '12345'; there are {', '.join(RULES)}$"):
        make_rule("12345", network())


@pytest.mark.parametrize(
    ("name", "typed", "meant"),
    [
        ("paper", "boundry", "boundary"),
        ("paper", "label_varaince", "label_variance"),
        ("tree", "los", "loss"),
        ("greedy", "stag", "stage"),
        ("bp", "pth", "path"),
    ],
)
def test_the_nearest_option_is_named(name, typed, meant):
    with pytest.raises(ValueError, match=f"^unknown option of {name} '{typed}'; did you mean {meant}"):
        make_rule(name, network(), **{typed: 1})


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("stream", "sweeps", 5),
        ("paper", "credit_sweeps", 0),
        ("tree", "tolerance", 0.1),
        ("scan", "readout", "head"),
        ("greedy", "noise", 0.1),
        ("bp", "stage", 2),
        ("bp", "engine", "loop"),
        ("pipeline", "spine", "last"),
        ("dgl", "rim", 0.3),
        ("bll", "scope", "block"),
    ],
)
def test_an_option_of_another_rule_is_none(name, option, value):
    with pytest.raises(ValueError, match=f"^unknown option of {name} '{option}'; "):
        make_rule(name, network(), **{option: value})


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"boundary": "left"}, "boundary is one of posterior, prior; got 'left'"),
        ({"scope": "global"}, "scope is one of block, triplet, tree; got 'global'"),
        ({"inversion": "newton"}, "inversion is one of none, taylor, exact; got 'newton'"),
        ({"family": "gamma"}, "family is one of gaussian, bernoulli, categorical; got 'gamma'"),
        ({"engine": "gpu"}, "engine is one of auto, loop, batched; got 'gpu'"),
        ({"step": 0.0}, "step must be positive; got 0.0"),
        ({"step": "long"}, "step is a number; got 'long'"),
        ({"variance": -1.0}, "variance must be positive; got -1.0"),
        ({"label_variance": float("nan")}, "label_variance must be positive; got nan"),
        ({"noise": -0.1}, "noise must not be negative; got -0.1"),
        ({"noise": 0.1, "family": "bernoulli"}, "noise is for Gaussian states: it would take other .*"),
        ({"iterations": 0}, "iterations must be at least 1; got 0"),
        ({"iterations": 2.5}, "iterations is a whole number; got 2.5"),
        ({"inversion": "exact", "family": "categorical"}, "the exact inversion is for Gaussian states; take .*"),
    ],
)
@pytest.mark.parametrize("name", ["paper", "tree"])
def test_what_a_tree_cannot_be(name, options, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        make_rule(name, network(), **options)


@pytest.mark.parametrize("name", [name for name in RULES if name not in ("bp", "2bw")])
@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (0, "stage must be at least 1; got 0"),
        (2.0, "stage is a whole number, or one for every stage; got 2.0"),
        ("23", "stage is a whole number, or one for every stage; got '23'"),
        ((2, 3), "stages of 2, 3 add up to 5 blocks; the network has 7"),
    ],
)
def test_stages_that_cannot_be_cut(name, value, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        make_rule(name, network(), stage=value)


@pytest.mark.parametrize("name", ["paper", "scan", "stream", "greedy", "pipeline", "2bw", "bp"])
@pytest.mark.parametrize(
    ("value", "sentence"), [("0.3", "rim is a number; got '0.3'"), (-1.0, "rim must not be negative; got -1.0")]
)
def test_weights_of_the_rim_that_cannot_be(name, value, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        make_rule(name, network(), rim=value)


@pytest.mark.parametrize("name", RULES)
def test_a_loss_is_a_function(name):
    with pytest.raises(ValueError, match=r"^loss is a function of predictions and labels; got 'ce'$"):
        make_rule(name, network(), loss="ce")


class Tempered(nn.Module):
    """A loss with a temperature of its own."""

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, logits, y):
        values, weights = cross_entropy(logits * self.rate, y)
        return values, weights


@pytest.mark.parametrize("name", RULES)
def test_a_loss_is_trained_or_refused(name):
    net, x, y = mlp(4)
    loss = Tempered()
    if name not in ("bp", "2bw", *LOCAL):
        with pytest.raises(
            ValueError, match=r"^the loss has parameters, which this rule does not train: let the head "
        ):
            make_rule(name, net, loss=loss)
        rule = make_rule(name, net, loss=loss.requires_grad_(False))
        rule.backward(x, y)
        assert loss.rate.grad is None
        return
    rule = make_rule(name, net, loss=loss)
    assert loss in rule.own(len(rule.stages))
    for _ in range(1 + rule.late):
        rule.backward(x, y)
    assert loss.rate.grad.abs() > 0


def test_stages_that_there_are_not():
    net, _, _ = mlp()
    rule = make_rule("stream", net, stage=(3, 4))
    for stage in (0, 3, -1):
        with pytest.raises(ValueError, match=f"stages 1 to 2; got {stage}"):
            rule.own(stage)
    with pytest.raises(ValueError, match="whole number"):
        make_rule("stream", net, stage=True)


@pytest.mark.parametrize("name", ["greedy", "bp", "paper", "dgl"])
def test_a_network_that_has_got_another_block(name):
    net, x, y = mlp()
    rule = make_rule(name, net, example=x)
    net.blocks.append(nn.Identity())
    assert len(net.resolve("chain")) == len(net.blocks)
    with pytest.raises(ValueError, match="had 7 blocks when the rule was made and has 8"):
        rule(x, y)


@pytest.mark.parametrize("name", ["stream", "paper", "dfa"])
def test_gradients_that_cannot_be_found(name):
    net, x, y = mlp()
    rule = make_rule(name, net, example=x)
    with torch.no_grad(), pytest.raises(ValueError, match=r"outside of torch.no_grad\(\)"):
        rule.backward(x, y)
    with torch.inference_mode(), pytest.raises(ValueError, match=r"torch.no_grad\(\) instead"):
        rule(x, y)
    rule.requires_grad_(False)
    assert rule(x, y).loss > 0
    assert all(p.grad is None for p in rule.parameters())


def test_a_context_may_have_any_names():
    class Embed(nn.Linear):
        def forward(self, x):
            return super().forward(x), {"state": 2.0}

    class Block(nn.Linear):
        def forward(self, z, state):
            return super().forward(z) * state

    torch.manual_seed(0)
    net = Chain(Embed(5, 6), [Block(6, 6) for _ in range(3)], nn.Linear(6, 3)).double()
    x, y = torch.randn(4, 5, dtype=torch.float64), torch.arange(4) % 3
    for name in ("stream", "bp", "dgl", "paper"):
        make_rule(name, net, example=x).backward(x, y)


class Apart(nn.Module):
    """A head that returns its scores in two parts."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, state):
        scores = self.head(state)
        return scores[:, :1], scores[:, 1:]


def squares(parts, y):
    return sum((part - goal).square().sum(1) for part, goal in zip(parts, y, strict=True))


@pytest.mark.parametrize("name", ["paper", "tree", "scan", "stream", "greedy", "pipeline", "2bw", "bp"])
def test_a_head_may_return_whatever_the_loss_takes(name):
    whole, x, _ = mlp(4)
    goal = torch.randn(len(x), whole(x).shape[1], dtype=torch.float64)
    parted = copy.deepcopy(whole)
    parted.head = Apart(parted.head)
    rule = make_rule(name, parted, loss=squares)
    oracle = make_rule(name, whole, loss=lambda scores, y: (scores - torch.cat(y, 1)).square().sum(1))
    y = goal[:, :1], goal[:, 1:]
    for _ in range(6):  # until a label has come through every stage
        for one in (rule, oracle):
            one.zero_grad()
        torch.testing.assert_close(rule.backward(x, y).loss, oracle.backward(x, y).loss)
    for (key, p), q in zip(rule.named_parameters(), oracle.parameters(), strict=True):
        assert (q.grad is None) == (p.grad is None), key
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad)


def test_solo_scales_one_tensor():
    net, x, y = mlp(4)
    net.head = Apart(net.head)
    with pytest.raises(ValueError, match="'solo' scales what the head returns, which is one tensor; got a tuple"):
        make_rule("solo", net, loss=squares).backward(x, y)


def test_a_number_of_stages_and_a_network_in_the_names_place_are_told():
    sentence = r"stage= is the number of blocks in a stage, .* stage=hbll\.cut\.even\(network, 2\)"
    with pytest.raises(ValueError, match=sentence):
        make_rule("stream", network(), stages=2)
    with pytest.raises(ValueError, match="the name of the rule comes first"):
        make_rule(network(), "stream")
