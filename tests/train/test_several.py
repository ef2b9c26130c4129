"""Runs in processes of their own: how one of them is asked to end."""

from queue import SimpleQueue
from types import SimpleNamespace

import pytest

from hbll.recipes import RECIPES
from hbll.train import checkpoint, several
from hbll.train.loop import Interrupted
from hbll.train.run import Run


@pytest.mark.parametrize(("asked", "position"), [(2, 2), (4, 4)])
def test_a_run_that_is_asked_to_end_is_saved_at_once(tmp_path, monkeypatch, asked, position):
    """Before a step; or, all four of the epoch being taken, while it is measured."""
    looks = iter(range(100))
    monkeypatch.setattr(several, "_stop", SimpleNamespace(is_set=lambda: next(looks) >= asked), raising=False)
    monkeypatch.setattr(several, "_told", SimpleQueue(), raising=False)
    recipe = RECIPES["digits"](blocks=3, width=8, epochs=1, train_samples=300, learning_rate=1e-3)
    run = Run(recipe=recipe, method="bp", seed=0, folder=tmp_path / "run")
    with pytest.raises(Interrupted):
        several._train_apart(run)
    state = checkpoint.load(run.checkpoint_file)
    assert (state["epoch"], state["position"]) == (0, position)
    assert next(looks) == asked + 1  # nobody looked again
