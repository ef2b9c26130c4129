"""The rule's options that recipes of chains take: what they do to the rule, and that a run keeps them."""

from dataclasses import replace

import pytest
import torch

from hbll import make_rule
from hbll.families import Bernoulli, Gaussian
from hbll.recipes import RECIPES, flag
from hbll.recipes.base import ChainRecipe
from hbll.rules import RULES
from hbll.rules.local import LocalRule
from hbll.train import metrics
from hbll.train.loop import train
from hbll.train.run import Run, open_run

DIGITS = RECIPES["digits"](blocks=7, width=8, epochs=1, train_samples=128)
LOCAL = [name for name, kind in RULES.items() if issubclass(kind, LocalRule)]
WHOLE = ["2bw", "bp"]  # of one stage
OTHERS = [name for name in RULES if name not in (*LOCAL, *WHOLE)]


def sizes(recipe, method):
    return [len(stage.blocks) for stage in recipe.rule(method, recipe.network(), None).stages]


@pytest.mark.parametrize("recipe", RECIPES.values())
def test_every_recipe_of_a_chain_has_the_options(recipe):
    options = {"stage": 2, "sweeps": 5, "credit_sweeps": 0, "tolerance": 0.1, "noise": 0.1, "rim": 0.5}
    if issubclass(recipe, ChainRecipe):
        assert recipe(**options).chosen() == options
        assert recipe(cuts=2).chosen() == {"cuts": 2}
        assert recipe().chosen() == {}
    else:
        with pytest.raises(TypeError):
            recipe(**options)


def test_what_is_chosen_is_the_rules():
    recipe = replace(DIGITS, stage=(3, 4), sweeps=1, credit_sweeps=2, tolerance=0.1, rim=0.2)
    rule = recipe.rule("scan", recipe.network(), None)
    assert [len(stage.blocks) for stage in rule.stages] == [3, 4]
    assert (rule.states.sweeps, rule.credit.sweeps, rule.rim) == (1, 2, 0.2)
    assert rule.states.tolerance == rule.credit.tolerance == 0.1


@pytest.mark.parametrize("method", RULES)
def test_what_is_not_chosen_is_the_rules_own(method):
    rule, own = DIGITS.rule(method, DIGITS.network(), None), make_rule(method, DIGITS.network())
    assert type(rule) is type(own)
    assert repr(rule) == repr(own)
    assert [len(stage.blocks) for stage in rule.stages] == [len(stage.blocks) for stage in own.stages]


@pytest.mark.parametrize("method", [*OTHERS, *LOCAL])
def test_all_rules_but_backpropagation_have_stages(method):
    assert sizes(replace(DIGITS, stage=3), method) == [3, 3, 1]
    for whole in WHOLE:
        assert sizes(replace(DIGITS, stage=3), whole) == [7]


@pytest.mark.parametrize(("cuts", "expected"), [(1, [7]), (2, [4, 3]), (3, [3, 2, 2]), (7, [1] * 7)])
def test_a_number_of_cuts_is_as_many_even_stages_of_local_rules(cuts, expected):
    for method in LOCAL:
        assert sizes(replace(DIGITS, cuts=cuts), method) == expected
    assert sizes(replace(DIGITS, cuts=cuts), "paper") == [1] * 7


@pytest.mark.parametrize(
    ("option", "value", "reading", "others"),
    [
        ("sweeps", 2, ["scan"], ["stream", "paper", "bp", "dgl"]),
        ("credit_sweeps", 2, ["scan"], ["stream", "pipeline"]),
        ("tolerance", 0.1, ["scan"], ["tree"]),
        ("stage", 2, [*OTHERS, *LOCAL], WHOLE),
        ("rim", 0.1, [*OTHERS, *WHOLE], LOCAL),
        ("cuts", 2, LOCAL, [*OTHERS, *WHOLE]),
    ],
)
def test_an_option_that_no_method_reads_is_refused(option, value, reading, others):
    recipe = replace(DIGITS, **{option: value})
    for method in reading:
        recipe.check([method])
        recipe.check([method, *others])
    for method in others:
        with pytest.raises(ValueError, match=f"^{flag(option)} does nothing for {method}: leave it out$"):
            recipe.check([method])


def test_stages_are_told_in_one_way():
    with pytest.raises(ValueError, match="give --stage or --cuts, not both"):
        replace(DIGITS, stage=2, cuts=2)


def test_more_cuts_than_blocks_cannot_be_had(tmp_path):
    run = Run(recipe=replace(DIGITS, cuts=8), method="bll", seed=0, folder=tmp_path)
    with pytest.raises(ValueError, match=r"cut it into 1\.\.7 stages, not 8"):
        train(run)
    with pytest.raises(ValueError, match="--cuts must be at least 1, not 0"):
        replace(DIGITS, cuts=0)


def test_sigmoid_states_are_bernoulli_variables():
    sigmoid = RECIPES["mnist-mlp"](width=8)
    assert isinstance(sigmoid.rule("bll", sigmoid.network(), None).family, Bernoulli)
    assert isinstance(DIGITS.rule("bll", DIGITS.network(), None).family, Gaussian)


def test_a_single_stage_of_all_blocks_is_backpropagation():
    network, samples = DIGITS.initial_network(0), DIGITS.splits(None).train[:64]

    def gradient(recipe, method):
        loss = recipe.rule(method, network, samples.inputs)(samples.inputs, samples.labels).loss
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(network.parameters()))])

    torch.testing.assert_close(gradient(replace(DIGITS, stage=7), "scan"), gradient(DIGITS, "bp"))


@pytest.mark.parametrize(("method", "stage"), [("paper", 3), ("scan", (3, 4)), ("stream", (3, 4)), ("greedy", 3)])
def test_a_run_is_trained_and_kept_with_its_options(tmp_path, method, stage):
    run = Run(recipe=replace(DIGITS, stage=stage, rim=0.3), method=method, seed=0, folder=tmp_path)
    train(run)
    assert open_run(tmp_path) == run
    assert [path["path"] for path in metrics.read(run.metrics_file)[-1].paths] == [
        "1-2-3-4-5-6-7",
        "block-4",
        "4-6",
        "4-6-7",
    ]
    typed = " ".join(map(str, [stage] if isinstance(stage, int) else stage))
    with pytest.raises(ValueError, match=f"was trained with --stage {typed}, not 2"):
        train(replace(run, recipe=replace(run.recipe, stage=2)), resume=True)


def test_a_run_of_a_local_rule_is_kept_with_its_cuts(tmp_path):
    run = Run(recipe=replace(DIGITS, cuts=2), method="bll", seed=0, folder=tmp_path)
    train(run)
    assert open_run(tmp_path) == run
    (line,) = metrics.read(run.metrics_file)
    assert list(line.nodes) == ["1", "2"]
    # Seven evaluations; back two products a block, but for the first of the second stage, whose input is detached. The
    # second stage begins after four evaluations and takes six more; the first is done after eight.
    assert (line.work, line.span) == (7 + 2 * 7 - 1, 4 + 3 + 3)
    assert [path["path"] for path in line.paths] == ["1-2-3-4-5-6-7"]
    with pytest.raises(ValueError, match="was trained with --cuts 2, not 3"):
        train(replace(run, recipe=replace(run.recipe, cuts=3)), resume=True)
