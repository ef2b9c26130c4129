"""The options of a rule: presets as the specification defines them, and one sentence for what cannot be."""

import pickle

import pytest
from torch import nn

from hbll.rule import PRESETS, Rule, make_rule


def test_presets_of_the_specification():
    paper, tree, bp = (make_rule(name, {}) for name in ("paper", "tree", "bp"))
    assert (paper.states, paper.boundary, paper.credit, paper.scope) == ("tree", "posterior", "arcs", "block")
    assert (tree.states, tree.boundary, tree.credit, tree.scope) == ("tree", "prior", "arcs", "triplet")
    assert (bp.states, bp.credit) == ("chain", "exact")
    for rule in (paper, tree):
        assert rule.inversion == "taylor"
        assert (rule.variance, rule.label_variance, rule.step, rule.noise) == (1.0, 1.0, 0.5, 0.0)
        assert rule.family == "gaussian"


@pytest.mark.parametrize("name", PRESETS)
def test_options_replace_the_presets(name):
    rule = make_rule(name, {"variance": 3.0, "engine": "loop"})
    assert rule == Rule(**{**PRESETS[name], "variance": 3.0, "engine": "loop"})
    assert rule != make_rule(name, {})
    assert pickle.loads(pickle.dumps(rule)) == rule


@pytest.mark.parametrize(("typed", "meant"), [("papper", "paper"), ("tre", "tree"), ("bpp", "bp")])
def test_the_nearest_rule_is_named(typed, meant):
    with pytest.raises(ValueError, match=f"unknown rule '{typed}'; did you mean {meant}"):
        make_rule(typed, {})


@pytest.mark.parametrize(
    ("typed", "meant"), [("boundry", "boundary"), ("label_varaince", "label_variance"), ("los", "loss")]
)
def test_the_nearest_option_is_named(typed, meant):
    with pytest.raises(ValueError, match=f"unknown option '{typed}'; did you mean {meant}"):
        make_rule("paper", {typed: 1})


def test_all_rules_are_listed_if_none_is_near():
    with pytest.raises(ValueError, match="there are") as caught:
        make_rule("12345", {})
    assert all(name in str(caught.value) for name in PRESETS)


@pytest.mark.parametrize("option", ["states", "boundary", "credit", "scope", "inversion", "family", "engine"])
def test_choices_are_listed(option):
    with pytest.raises(ValueError, match=f"{option} is one of .*; got 'nonsense'"):
        Rule(**{option: "nonsense"})


@pytest.mark.parametrize("option", ["step", "variance", "label_variance"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_scales_are_positive(option, value):
    with pytest.raises(ValueError, match=f"{option} must be positive"):
        Rule(**{option: value})


@pytest.mark.parametrize(
    "options",
    [
        {"noise": -0.1},
        {"iterations": 0},
        {"inversion": "exact", "family": "categorical"},
        {"states": "chain", "boundary": "posterior"},
        {"states": "tree", "boundary": "prior", "credit": "exact"},
        {"states": "chain", "boundary": "prior", "credit": "arcs", "path": "4-6"},
    ],
)
def test_what_cannot_be_is_refused(options):
    with pytest.raises(ValueError, match=r"\w{4,}"):
        Rule(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sweeps": 2.5}, "sweeps is a whole number; got 2.5"),
        ({"credit_sweeps": None}, "credit_sweeps is a whole number; got None"),
        ({"rim": "0.3"}, "rim is a number; got '0.3'"),
        ({"tolerance": "0.3"}, "tolerance is a number and not negative; got '0.3'"),
        ({"tolerance": -0.3}, "tolerance is a number and not negative; got -0.3"),
        ({"stage": 2.0}, "stage is a whole number, or one for every node; got 2.0"),
        ({"stage": "23"}, "stage is a whole number, or one for every node; got '23'"),
        ({"stage": None}, "stage is a whole number, or one for every node; got None"),
        ({"jumps": [3]}, r"jumps are modules, one per stage; got \[3\]"),
        ({"loss": "ce"}, "loss is a function of predictions and labels; got 'ce'"),
    ],
)
def test_values_of_another_type_are_said_to_be(options, said):
    with pytest.raises(ValueError, match=f"^{said}$"):
        Rule(**options)


@pytest.mark.parametrize(
    ("preset", "option", "value", "said"),
    [
        ("stream", "sweeps", 5, "sweeps is for states='scan', and does nothing with states='stream'"),
        ("paper", "credit_sweeps", 0, "credit_sweeps is for credit='scan', and does nothing with credit='arcs'"),
        ("scan", "jumps", [nn.Linear(1, 1)], "jumps is for guess='tree' or guess='star', .* with guess='ahead'"),
        ("tree", "tolerance", 0.1, "tolerance is for states='scan' or credit='scan', .* states='tree', credit='arcs'"),
        ("scan", "heads", "own", "heads is for credit='spine', and does nothing with credit='scan'"),
        ("stream", "noise", 0.1, "noise is for credit='arcs' or scope='block', .* credit='spine', scope='triplet'"),
    ],
)
def test_an_option_that_does_nothing_is_refused(preset, option, value, said):
    with pytest.raises(ValueError, match=said):
        make_rule(preset, {option: value})


def test_a_loss_is_trained_by_backpropagation_alone():
    loss = nn.Linear(1, 1)
    with pytest.raises(
        ValueError, match="the loss has parameters, which this rule does not train: let the head have them"
    ):
        make_rule("paper", {"loss": loss})
    assert make_rule("bp", {"loss": loss}).loss is loss
    assert make_rule("paper", {"loss": loss.requires_grad_(False)}).loss is loss


def test_a_rule_cannot_be_changed():
    with pytest.raises(AttributeError):
        make_rule("paper", {}).step = 1.0
