"""Recipes whose states change shape: networks with their own number of layers, for the rules that evaluate them in order."""

from dataclasses import replace

import pytest
from torch import nn

from hbll import Chain
from hbll.recipes import RECIPES
from hbll.rules import RULES
from hbll.train.compare import Comparison, compare
from hbll.train.evaluate import evaluate_run
from hbll.train.loop import train
from hbll.train.run import Run

RESNET = RECIPES["cifar10-resnet"](width=2, epochs=1, batch_size=20, train_samples=40)
FITTING = ["pipeline", "2bw", "bp", "dgl", "predsim", "ff", "cff", "dfa", "bll"]


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES.values() if hasattr(recipe, "layers")])
def test_they_have_their_own_number_of_layers(recipe):
    network = recipe(width=2).network()
    assert isinstance(network, Chain)
    assert isinstance(network.embed, nn.Identity)
    assert recipe(width=2).block_count == len(network.blocks)
    for option in ("depth", "blocks"):
        with pytest.raises(ValueError, match="leave out --depth and --blocks"):
            recipe(**{option: 2})


@pytest.mark.parametrize("method", RULES)
def test_rules_that_jump_are_not_for_them(method):
    network = RESNET.network()
    if method in FITTING:
        assert RESNET.rule(method, network, None).network is network
    else:
        fitting = ", ".join(FITTING)
        sentence = f"^the states of cifar10-resnet change shape, which {method} is not for: take one of {fitting}$"
        with pytest.raises(ValueError, match=sentence):
            RESNET.rule(method, network, None)


def test_a_rule_that_there_is_not():
    with pytest.raises(ValueError, match=r"unknown rule 'dlg'; did you mean dgl\?"):
        RESNET.rule("dlg", RESNET.network(), None)


def test_the_rim_is_not_for_them():
    with pytest.raises(ValueError, match=r"^--rim does nothing for bp, pipeline: leave it out$"):
        replace(RESNET, rim=0.1).check(["bp", "pipeline"])


def test_they_are_trained_and_compared(small_data, tmp_path):
    comparison = Comparison(
        recipe=replace(RESNET, cuts=3), methods=("bp", "bll"), seeds=1, folder=tmp_path / "made", data_dir=small_data
    )
    bp, bll = compare(comparison)
    assert [path["path"] for path in bp["paths"]] == ["chain"]
    assert (bp["local"], bll["local"]) == ("no: crosses 9 blocks", "yes")
    assert (bp["span"], bll["span"]) == (2 * 9, 9 + 3)


def test_there_is_one_path(small_data, tmp_path):
    run = Run(recipe=RESNET, method="pipeline", seed=0, folder=tmp_path, data_dir=small_data)
    train(run)
    (path,) = evaluate_run(tmp_path)
    assert (path["path"], path["blocks"]) == ("chain", 9)
    assert evaluate_run(tmp_path, ["chain"]) == [path]
    with pytest.raises(ValueError, match="'8' is not a path: states change shape, and there is one, the chain"):
        evaluate_run(tmp_path, ["8"])
