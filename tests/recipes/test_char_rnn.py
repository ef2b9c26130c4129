"""The recurrent character model: its network, and every method for a step."""

import math

import pytest
import torch

from hbll.recipes import RECIPES
from hbll.train import metrics
from hbll.train.evaluate import evaluate_run
from hbll.train.loop import train
from hbll.train.run import Run


def test_the_network_predicts_after_every_character():
    recipe = RECIPES["char-rnn"](depth=3, width=8)
    network = recipe.initial_network(0)
    x = torch.randint(65, (4, 8))
    assert network(x).shape == (4, 8, 65)
    for method in ("hbll", "bptt", "paper"):
        assert recipe.rule(method, network, x).backward(x, x).loss.isfinite()


def test_a_symbol_that_there_is_not():
    with pytest.raises(ValueError, match="numbered 0 to 64"):
        RECIPES["char-rnn"](depth=2, width=8).initial_network(0)(torch.tensor([[65, 0, 0, 0]]))


@pytest.mark.parametrize("method", ["hbll", "bptt"])
def test_a_run_is_measured_by_the_bits_of_its_chain(small_data, tmp_path, method):
    recipe = RECIPES["char-rnn"](depth=3, width=4, epochs=1, train_samples=128)
    run = Run(recipe=recipe, method=method, seed=0, folder=tmp_path / "run", data_dir=small_data)
    train(run)
    (path,) = evaluate_run(run.folder)
    assert [path] == metrics.read(run.metrics_file)[-1].paths
    assert (path["path"], path["blocks"]) == ("chain", 8)
    assert 0 < path["accuracy"] < 0.2
    # Of a text of 65 characters in a random order nothing can be learnt but their frequencies, which are equal.
    assert path["bits_per_character"] == pytest.approx(math.log2(65), abs=0.3)
    assert path["cross_entropy"] == pytest.approx(path["bits_per_character"] * math.log(2))
    with pytest.raises(ValueError, match="only the chain has outputs of every step"):
        evaluate_run(run.folder, ["4-6-7"])
