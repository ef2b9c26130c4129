"""VGG8b by its recipe: trained by backpropagation and by local rules on states that change shape."""

import pytest
import torch

from hbll.recipes import RECIPES
from hbll.train import metrics
from hbll.train.evaluate import evaluate_run
from hbll.train.loop import train
from hbll.train.run import Run

Recipe = RECIPES["cifar10-vgg"]
SMALL = Recipe(width=4, epochs=1, train_samples=90, batch_size=30)


def test_by_default_it_is_the_papers():
    with torch.device("meta"):
        network = Recipe().network()
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == 8.9


@pytest.mark.parametrize("method", ["bp", "dgl", "predsim", "ff", "cff", "dfa"])
def test_a_run_is_trained_and_evaluated(small_data, tmp_path, method):
    run = Run(recipe=SMALL, method=method, seed=0, folder=tmp_path / "run", data_dir=small_data)
    train(run)
    (line,) = metrics.read(run.metrics_file)
    assert evaluate_run(run.folder) == line.paths
    assert line.paths[0]["path"] == "chain"
    assert line.paths[0]["blocks"] == Recipe.layers == len(SMALL.network().blocks)
    assert len(line.nodes) == (1 if method == "bp" else Recipe.layers)


def test_dropout_is_a_share():
    with pytest.raises(ValueError, match="--dropout must be at least 0 and less than 1"):
        Recipe(dropout=1.0)
