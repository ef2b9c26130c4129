"""Recipes whose state is more than a vector, under every preset: they train, go on after an interruption, are evaluated."""

import pytest
from tests.stopping import stopped_and_resumed

from hbll.recipes import RECIPES
from hbll.rule import PRESETS
from hbll.training import checkpoint, metrics
from hbll.training.evaluate import evaluate_run
from hbll.training.loop import train
from hbll.training.run import Run

SMALL = [
    RECIPES["cifar10-conv"](blocks=2, width=4, epochs=1, train_samples=90, batch_size=30),
    RECIPES["shakespeare-gpt"](blocks=2, width=8, context=16, epochs=1, train_samples=60, batch_size=20),
]


def weights(run):
    return checkpoint.load(run.checkpoint_file)["network"]


@pytest.mark.parametrize("recipe", SMALL, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("method", PRESETS)
def test_a_run_is_trained_resumed_and_evaluated(small_data, tmp_path, recipe, method):
    whole = Run(recipe=recipe, method=method, seed=0, folder=tmp_path / "whole", data_dir=small_data)
    train(whole)
    stopped = stopped_and_resumed(whole, tmp_path / "stopped", after=1)
    ends = weights(stopped)
    assert all(value.equal(ends[name]) for name, value in weights(whole).items())
    paths = evaluate_run(stopped.folder)
    assert paths == metrics.read(whole.metrics_file)[-1].paths
    assert [path["path"] for path in paths] == ["1-2", "1"]
