import math

import pytest
import torch
from torch import nn

from hbll import Chain, make_rule
from hbll.data import Samples
from hbll.network import Readout
from hbll.recipes import RECIPES
from hbll.recipes.measures import ACCURACY, CHARACTER_MEASURES, CROSS_ENTROPY
from hbll.train import metrics
from hbll.train.evaluate import evaluate_run, load_rule, measured
from hbll.train.loop import train
from hbll.train.run import Run


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
    return make_rule("paper", Chain(nn.Identity(), [Shift(node) for node in range(1, 4)], nn.Identity()))


def along(*paths):
    return [Readout("-".join(map(str, path)), path, len(path)) for path in paths]


def test_accuracy_is_the_share_of_correct_guesses_along_each_path(shifting):
    inputs = torch.eye(10).repeat(250, 1)  # more than are evaluated at once
    labels = (inputs.argmax(-1) + 5) % 10  # what blocks 2 and 3 come to
    labels[:500] = (inputs[:500].argmax(-1) + 2) % 10  # what block 2 alone comes to
    results = measured(shifting, Samples(inputs, labels), along((1, 2, 3), (2,), (2, 3)), [ACCURACY])
    assert results == [
        {"path": "1-2-3", "blocks": 3, "accuracy": 0.0},
        {"path": "2", "blocks": 1, "accuracy": 0.2},
        {"path": "2-3", "blocks": 2, "accuracy": 0.8},
    ]


def test_every_label_of_a_sequence_counts_in_every_measure(shifting):
    inputs = torch.eye(10).repeat(30, 1).view(60, 5, 10)
    labels = (inputs.argmax(-1) + 2) % 10
    labels[:, 0] = (labels[:, 0] + 1) % 10  # one of five is wrong
    (result,) = measured(shifting, Samples(inputs, labels), along((2,)), CHARACTER_MEASURES)
    # A one-hot state as logits gives its class e / (e + 9) and each other one 1 / (e + 9).
    nats = math.log(math.e + 9) - 4 / 5
    assert result["accuracy"] == pytest.approx(0.8)
    assert result["cross_entropy"] == pytest.approx(nats)
    assert result["bits_per_character"] == pytest.approx(nats / math.log(2))


def test_a_measure_that_is_not_finite_is_none(shifting):
    inputs, labels = torch.full((3, 10), float("nan")), torch.zeros(3, dtype=torch.long)
    (result,) = measured(shifting, Samples(inputs, labels), along((2,)), [CROSS_ENTROPY])
    assert result["cross_entropy"] is None


def test_evaluation_happens_in_evaluation_mode_without_gradients(shifting):
    modes = []
    blocks = shifting.network.blocks
    blocks[1].register_forward_hook(lambda *_: modes.append((blocks.training, torch.is_grad_enabled())))
    blocks[2].eval()
    measured(shifting, Samples(torch.eye(10), torch.arange(10)), along((2,)), [ACCURACY])
    assert modes == [(False, False)]
    assert blocks[1].training
    assert not blocks[2].training


def test_a_readout_may_have_scores_of_its_own(shifting):
    inputs = torch.eye(10)
    readout = Readout("turned", (2,), 1, scores=lambda x: x.roll(7, -1))
    (result,) = measured(shifting, Samples(inputs, (torch.arange(10) + 7) % 10), [readout], [ACCURACY])
    assert result == {"path": "turned", "blocks": 1, "accuracy": 1.0}


@pytest.fixture
def run(tmp_path):
    recipe = RECIPES["digits"](blocks=3, width=16, epochs=2)
    run = Run(recipe=recipe, method="bp", seed=1, folder=tmp_path)
    train(run)
    return run


def test_a_run_evaluates_to_what_its_last_epoch_measured(run):
    paths = evaluate_run(run.folder)
    assert paths == metrics.read(run.metrics_file)[-1].paths
    assert [list(path) for path in paths] == [["path", "blocks", "accuracy"]] * 3
    assert [(path["path"], path["blocks"]) for path in paths] == [("1-2-3", 3), ("2", 1), ("2-3", 2)]
    assert evaluate_run(run.folder, ["2-3"]) == evaluate_run(run.folder, ["rim"])
    assert evaluate_run(run.folder, ["chain"])[0]["path"] == "1-2-3"


def test_the_network_of_a_run_is_an_ordinary_one(run):
    test = run.recipe.splits(None).test
    chain = load_rule(run).network.sequential()
    share = (chain(test.inputs).argmax(-1) == test.labels).float().mean().item()
    assert share == pytest.approx(metrics.read(run.metrics_file)[-1].chain["accuracy"])


def test_what_is_no_path_of_the_network_is_refused(run):
    with pytest.raises(ValueError, match="3 is not a path"):
        evaluate_run(run.folder, ["3"])
