"""Recipes whose networks are cut into blocks: what --cuts does to the rule, and plain networks."""

from dataclasses import replace

import pytest

from hbll.cuts import SequentialNetwork
from hbll.families import Bernoulli, Gaussian
from hbll.methods import METHODS
from hbll.recipes import RECIPES
from hbll.training import metrics
from hbll.training.compare import Comparison, compare
from hbll.training.loop import train
from hbll.training.run import Run, open_run

DIGITS = RECIPES["digits"](blocks=3, width=8, epochs=1, train_samples=128)
RESNET = RECIPES["cifar10-resnet"]


@pytest.mark.parametrize("cuts", [None, 1, 2, 4])
def test_local_rules_see_as_many_blocks_as_are_asked_for(cuts):
    recipe = replace(DIGITS, cuts=cuts)
    blocks = recipe.objective("bll").cut(recipe.network())
    assert len(blocks.segments) == (cuts or 4)  # the embed and three blocks


@pytest.mark.parametrize("method", ["bp", "paper"])
def test_rules_that_have_nothing_to_cut_are_as_without(method):
    assert repr(replace(DIGITS, cuts=2).objective(method)) == repr(DIGITS.objective(method))


def test_sigmoid_states_are_bernoulli_variables():
    assert isinstance(RECIPES["mnist-mlp"](width=8).objective("bll").family, Bernoulli)
    assert isinstance(DIGITS.objective("bll").family, Gaussian)


def test_more_cuts_than_layers_cannot_be_had(tmp_path):
    run = Run(recipe=replace(DIGITS, cuts=5), method="bll", seed=0, folder=tmp_path)
    with pytest.raises(ValueError, match=r"cut it into 1\.\.4 blocks, not 5"):
        train(run)
    with pytest.raises(ValueError, match="--cuts must be at least 1, not 0"):
        replace(DIGITS, cuts=0)


def test_a_run_is_kept_with_its_cuts(tmp_path):
    run = Run(recipe=replace(DIGITS, cuts=2), method="bll", seed=0, folder=tmp_path)
    train(run)
    assert open_run(tmp_path) == run
    (line,) = metrics.read(run.metrics_file)
    assert list(line.nodes) == ["1", "2"]
    assert (line.work, line.span) == (3 * 3 - 1, 3 + 2)
    assert [path["path"] for path in line.paths] == ["1-2-3"]
    with pytest.raises(ValueError, match="was trained with --cuts 2, not 3"):
        train(replace(run, recipe=replace(run.recipe, cuts=3)), resume=True)


def test_methods_of_a_plain_network_are_the_local_rules():
    for method in METHODS:
        assert RESNET(width=2).objective(method)
    with pytest.raises(ValueError, match="unknown rule 'paper'"):
        RESNET(width=2).objective("paper")


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES.values() if hasattr(recipe, "layers")])
def test_plain_networks_have_their_own_number_of_layers(recipe):
    network = recipe(width=2).network()
    assert isinstance(network, SequentialNetwork)
    assert recipe(width=2).block_count == len(network) - 1
    for option in ("depth", "blocks"):
        with pytest.raises(ValueError, match="leave out --depth and --blocks"):
            recipe(**{option: 2})


def test_a_plain_network_is_trained_and_compared(small_data, tmp_path):
    recipe = RESNET(width=2, epochs=1, batch_size=20, train_samples=40, cuts=3)
    comparison = Comparison(
        recipe=recipe, methods=("bp", "bll"), seeds=1, folder=tmp_path / "made", data_dir=small_data
    )
    bp, bll = compare(comparison)
    assert [path["path"] for path in bp["paths"]] == ["chain"]
    assert (bp["local"], bll["local"]) == ("no: crosses 9 blocks", "yes")
    assert (bp["span"], bll["span"]) == (2 * 9, 9 + 3)
