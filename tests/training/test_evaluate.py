import pytest
import torch
from torch import nn

from hbll import TreeNetwork
from hbll.data import Samples
from hbll.recipes import RECIPES
from hbll.training import metrics
from hbll.training.evaluate import accuracies, evaluate_run, load_network, usual_paths
from hbll.training.loop import train
from hbll.training.run import Run


class Shift(nn.Module):
    """Moves a one-hot state on by some places."""

    def __init__(self, places):
        super().__init__()
        self.places = places

    def forward(self, state):
        return state.roll(self.places, -1)


@pytest.fixture
def shifting():
    """A path's guess is the input moved on by the sum of its blocks' numbers."""
    return TreeNetwork(embed=nn.Identity(), blocks=[Shift(node) for node in range(1, 4)], head=nn.Identity())


def test_accuracy_is_the_share_of_correct_guesses_along_each_path(shifting):
    inputs = torch.eye(10).repeat(250, 1)  # more than are evaluated at once
    labels = (inputs.argmax(-1) + 5) % 10  # what blocks 2 and 3 come to
    labels[:500] = (inputs[:500].argmax(-1) + 2) % 10  # what block 2 alone comes to
    shares = accuracies(shifting, Samples(inputs, labels), [(1, 2, 3), (2,), (2, 3)])
    assert shares == {(1, 2, 3): 0.0, (2,): 0.2, (2, 3): 0.8}


def test_evaluation_happens_in_evaluation_mode_without_gradients(shifting):
    modes = []
    shifting.head.register_forward_hook(lambda *_: modes.append((shifting.training, torch.is_grad_enabled())))
    accuracies(shifting, Samples(torch.eye(10), torch.arange(10)), [(2,)])
    assert modes == [(False, False)]
    assert shifting.training


def test_the_usual_paths_are_the_chain_and_the_rim_cut_short():
    def paths(blocks):
        return usual_paths(TreeNetwork(embed=nn.Identity(), blocks=[Shift(0)] * blocks, head=nn.Identity()))

    assert paths(7) == [(1, 2, 3, 4, 5, 6, 7), (4,), (4, 6), (4, 6, 7)]
    assert paths(1) == [(1,)]


@pytest.fixture
def run(tmp_path):
    recipe = RECIPES["digits"](blocks=3, width=16, epochs=2)
    run = Run(recipe=recipe, method="bp", seed=1, folder=tmp_path)
    train(run)
    return run


def test_a_run_evaluates_to_what_its_last_epoch_measured(run):
    last = metrics.read(run.metrics_file)[-1].accuracy
    assert evaluate_run(run.folder) == [
        {"path": "1-2-3", "blocks": 3, "accuracy": last["1-2-3"]},
        {"path": "2", "blocks": 1, "accuracy": last["2"]},
        {"path": "2-3", "blocks": 2, "accuracy": last["2-3"]},
    ]
    assert evaluate_run(run.folder, ["2-3"]) == evaluate_run(run.folder, ["rim"])
    assert evaluate_run(run.folder, ["chain"])[0]["path"] == "1-2-3"


def test_the_network_of_a_run_is_an_ordinary_one(run):
    test = run.recipe.splits(None).test
    chain = load_network(run).sequential()
    share = (chain(test.inputs).argmax(-1) == test.labels).float().mean().item()
    assert share == pytest.approx(metrics.read(run.metrics_file)[-1].accuracy["1-2-3"])


def test_what_is_no_path_of_the_network_is_refused(run):
    with pytest.raises(ValueError, match="3 is not a path"):
        evaluate_run(run.folder, ["3"])
