"""Recipes whose state is more than a vector: they train, go on after an interruption, are evaluated."""

from dataclasses import replace

import pytest
from tests.stopping import stopped_and_resumed

from hbll.recipes import RECIPES
from hbll.rules import RULES
from hbll.train import checkpoint, metrics
from hbll.train.evaluate import evaluate_run
from hbll.train.loop import train
from hbll.train.run import Run

CONV = RECIPES["cifar10-conv"](blocks=2, width=4, epochs=1, train_samples=90, batch_size=30)
GPT = RECIPES["shakespeare-gpt"](blocks=2, width=8, context=16, epochs=1, train_samples=60, batch_size=20)
VIT = RECIPES["cifar100-vit"](
    blocks=2, width=8, heads=2, patch=8, epochs=1, train_samples=48, batch_size=8, accumulate=2, precision="bfloat16"
)
NOVELS = RECIPES["novels-gpt"](blocks=2, width=8, context=16, epochs=1, batch_size=8, vocabulary_size=300)


def weights(run):
    return checkpoint.load(run.checkpoint_file)["rule"]


@pytest.mark.parametrize(
    ("recipe", "method"),
    [(CONV, name) for name in RULES]
    + [(GPT, name) for name in RULES if name != "ff"]  # which writes into pixels
    + [(VIT, name) for name in ("paper", "tree", "scan", "stream", "greedy", "bp")]
    + [(NOVELS, name) for name in ("paper", "scan", "stream", "bp")]
    + [(replace(NOVELS, positions="rotary"), name) for name in ("paper", "stream", "bp")],
    ids=lambda part: getattr(part, "name", part),
)
def test_a_run_is_trained_resumed_and_evaluated(small_data, tmp_path, recipe, method):
    whole = Run(recipe=recipe, method=method, seed=0, folder=tmp_path / "whole", data_dir=small_data)
    train(whole)
    stopped = stopped_and_resumed(whole, tmp_path / "stopped", after=1)
    ends = weights(stopped)
    assert all(value.equal(ends[name]) for name, value in weights(whole).items())
    paths = evaluate_run(stopped.folder)
    assert paths == metrics.read(whole.metrics_file)[-1].paths
    assert paths[0]["path"] == "1-2"


def test_symbols_are_no_pixels_that_a_label_could_be_written_into(small_data, tmp_path):
    run = Run(recipe=GPT, method="ff", seed=0, folder=tmp_path / "run", data_dir=small_data)
    with pytest.raises(ValueError, match="ff writes the label into the inputs"):
        train(run)
