"""Every local rule by name through the training loop: runs resume bit-exactly and are evaluated by the rule's readouts."""

import pytest
from tests.stopping import stopped_and_resumed

from hbll.methods import METHODS
from hbll.recipes import RECIPES
from hbll.rule import PRESETS
from hbll.training import checkpoint, metrics
from hbll.training.evaluate import evaluate_run
from hbll.training.loop import train
from hbll.training.run import Run


@pytest.mark.parametrize("method", [method for method in METHODS if method not in PRESETS])
def test_a_run_is_trained_resumed_and_evaluated(tmp_path, method):
    recipe = RECIPES["digits"](blocks=2, width=16, epochs=1, train_samples=300)
    whole = Run(recipe=recipe, method=method, seed=0, folder=tmp_path / "whole")
    train(whole)
    stopped = stopped_and_resumed(whole, tmp_path / "stopped", after=2)
    ours, theirs = (checkpoint.load(run.checkpoint_file) for run in (whole, stopped))
    for part in ("network", "objective"):
        assert all(value.equal(theirs[part][name]) for name, value in ours[part].items())
    paths = evaluate_run(stopped.folder)
    assert paths == metrics.read(whole.metrics_file)[-1].paths
    assert [path["path"] for path in paths] == ["1-2", *(["goodness"] if method == "ff" else [])]
    assert evaluate_run(stopped.folder, [path["path"] for path in paths]) == paths
    if method == "ff":
        assert evaluate_run(stopped.folder, ["1"])[0]["blocks"] == 1  # the tree's other paths are there as ever
