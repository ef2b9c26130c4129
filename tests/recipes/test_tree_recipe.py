"""The rule's options that recipes take: what they do to the rule, and that a run keeps them."""

import re
from dataclasses import replace

import pytest
import torch

from hbll import Objective, TreeNetwork
from hbll.recipes import RECIPES, flag
from hbll.rule import PRESETS
from hbll.training import metrics
from hbll.training.loop import train
from hbll.training.run import Run, open_run

DIGITS = RECIPES["digits"](blocks=7, width=8, epochs=1, train_samples=128)


@pytest.mark.parametrize("recipe", RECIPES.values())
def test_every_recipe_with_a_tree_of_blocks_has_the_options(recipe):
    options = {"stage": 2, "sweeps": 5, "credit_sweeps": 0, "tolerance": 0.1, "rim": 0.5}
    if isinstance(recipe().network(), TreeNetwork):
        rule = recipe(**options).objective("scan").rule
        assert {option: getattr(rule, option) for option in options} == options
    else:
        with pytest.raises(TypeError):
            recipe(**options)


@pytest.mark.parametrize("method", PRESETS)
def test_what_is_not_chosen_is_the_presets_own(method):
    assert DIGITS.objective(method).rule == Objective(method).rule
    assert replace(DIGITS, stage=3).objective(method).rule == Objective(method, stage=3).rule
    assert replace(DIGITS, rim=0.1).objective(method).rule == Objective(method, rim=0.1).rule
    swept = replace(DIGITS, sweeps=1, credit_sweeps=2, tolerance=0.1)
    expected = {"sweeps": 1, "credit_sweeps": 2, "tolerance": 0.1} if method == "scan" else {}
    assert swept.objective(method).rule == Objective(method, **expected).rule


@pytest.mark.parametrize(
    ("option", "value", "reading", "others"),
    [
        ("sweeps", 2, ["scan"], ["stream", "paper", "bp", "dgl"]),
        ("credit_sweeps", 2, ["scan"], ["stream", "pipeline"]),
        ("tolerance", 0.1, ["scan"], ["tree"]),
        ("stage", 2, list(PRESETS), ["bll", "ff"]),
        ("rim", 0.1, list(PRESETS), ["predsim"]),
        ("cuts", 2, ["dgl", "dfa"], list(PRESETS)),
    ],
)
def test_an_option_that_no_method_reads_is_refused(option, value, reading, others):
    recipe = replace(DIGITS, **{option: value})
    for method in reading:
        recipe.check_read([method])
        recipe.check_read([method, *others])
    for method in others:
        with pytest.raises(ValueError, match=f"^{flag(option)} does nothing for {method}: leave it out$"):
            recipe.check_read([method])


def test_a_single_stage_of_all_blocks_is_backpropagation():
    network, samples = DIGITS.initial_network(0), DIGITS.splits(None).train[:64]

    def gradient(recipe, method):
        loss = recipe.objective(method)(network, samples.inputs, samples.labels).loss
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(network.parameters()))])

    torch.testing.assert_close(gradient(replace(DIGITS, stage=7), "scan"), gradient(DIGITS, "bp"))


@pytest.mark.parametrize("stage", [3, (3, 4)])
@pytest.mark.parametrize("method", PRESETS)
def test_a_run_is_trained_and_kept_with_its_options(tmp_path, method, stage):
    run = Run(recipe=replace(DIGITS, stage=stage, rim=0.3), method=method, seed=0, folder=tmp_path)
    train(run)
    assert open_run(tmp_path) == run
    assert [path["path"] for path in metrics.read(run.metrics_file)[-1].paths] == ["1-2-3-4-5-6-7", "4", "4-6", "4-6-7"]
    with pytest.raises(ValueError, match=rf"was trained with --stage {re.escape(str(stage))}, not 2"):
        train(replace(run, recipe=replace(run.recipe, stage=2)), resume=True)
