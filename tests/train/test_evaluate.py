import math

import pytest
import torch
from torch import nn

from hbll import Chain, make_rule
from hbll.calls import Readout
from hbll.data import Samples
from hbll.exits import calibrate, confidence, first_exits
from hbll.recipes import RECIPES
from hbll.recipes.measures import ACCURACY, CHARACTER_MEASURES, CROSS_ENTROPY
from hbll.train import metrics
from hbll.train.evaluate import evaluate_exits, evaluate_run, load_rule, measured
from hbll.train.loop import train
from hbll.train.run import Run
from hbll.tree import format_path


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
    return [Readout(format_path(path), path, len(path)) for path in paths]


def test_accuracy_is_the_share_of_correct_guesses_along_each_path(shifting):
    inputs = torch.eye(10).repeat(250, 1)  # more than are evaluated at once
    labels = (inputs.argmax(-1) + 5) % 10  # what blocks 2 and 3 come to
    labels[:500] = (inputs[:500].argmax(-1) + 2) % 10  # what block 2 alone comes to
    results = measured(shifting, Samples(inputs, labels), along((1, 2, 3), (2,), (2, 3)), [ACCURACY])
    assert results == [
        {"path": "1-2-3", "blocks": 3, "accuracy": 0.0},
        {"path": "block-2", "blocks": 1, "accuracy": 0.2},
        {"path": "2-3", "blocks": 2, "accuracy": 0.8},
    ]


def test_what_is_done_is_told_after_each_batch(shifting):
    inputs = torch.eye(10).repeat(250, 1)
    told = []
    samples = Samples(inputs, inputs.argmax(-1))
    measured(shifting, samples, along((1,)), [ACCURACY], on_batch=lambda *count: told.append(count))
    assert told == [(1, 3), (2, 3), (3, 3)]  # of 1,000 samples at most


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


def test_readouts_share_what_they_can_of_every_batch(shifting):
    evaluated = []
    for block in shifting.network.blocks:
        block.register_forward_hook(lambda *_: evaluated.append(1))
    readouts = [*along((1, 2, 3), (2,), (2, 3)), Readout("none", (2,), 1, scores=lambda x: x)]
    measured(shifting, Samples(torch.eye(10), torch.arange(10)), readouts, [ACCURACY])
    assert len(evaluated) == 3 + 1 + 1


def test_a_readout_may_have_scores_of_its_own(shifting):
    inputs = torch.eye(10)
    readout = Readout("turned", (2,), 1, scores=lambda x: x.roll(7, -1))
    (result,) = measured(shifting, Samples(inputs, (torch.arange(10) + 7) % 10), [readout], [ACCURACY])
    assert result == {"path": "turned", "blocks": 1, "accuracy": 1.0}


def trained(folder, method, blocks=3, **options):
    recipe = RECIPES["digits"](blocks=blocks, width=16, epochs=2, **options)
    run = Run(recipe=recipe, method=method, seed=1, folder=folder)
    train(run)
    return run


@pytest.fixture
def run(tmp_path):
    return trained(tmp_path, "bp")


@pytest.fixture(scope="module")
def greedy_run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("greedy"), "greedy", blocks=7, stage=(2, 2, 3))


def test_a_run_evaluates_to_what_its_last_epoch_measured(run):
    paths = evaluate_run(run.folder)
    assert paths == metrics.read(run.metrics_file)[-1].paths
    assert [list(path) for path in paths] == [["path", "blocks", "accuracy"]] * 3
    assert [(path["path"], path["blocks"]) for path in paths] == [("1-2-3", 3), ("block-2", 1), ("2-3", 2)]
    assert evaluate_run(run.folder, ["2-3"]) == evaluate_run(run.folder, ["rim"])
    assert evaluate_run(run.folder, ["chain"])[0]["path"] == "1-2-3"


def test_the_network_of_a_run_is_an_ordinary_one(run):
    test = run.recipe.splits(None).test
    chain = load_rule(run).network.sequential()
    share = (chain(test.inputs).argmax(-1) == test.labels).float().mean().item()
    assert share == pytest.approx(metrics.read(run.metrics_file)[-1].chain["accuracy"])


def test_the_names_that_are_printed_and_numbers_of_blocks_are_paths_to_evaluate(run):
    usual = evaluate_run(run.folder)
    assert evaluate_run(run.folder, [path["path"] for path in usual]) == usual
    assert evaluate_run(run.folder, ["3", "1", "2"]) == usual


def test_what_is_no_path_of_the_network_is_refused(run):
    with pytest.raises(ValueError, match="block-3 is not a path"):
        evaluate_run(run.folder, ["block-3"])
    with pytest.raises(ValueError, match="a path has between 1 and 3 blocks here; got 4"):
        evaluate_run(run.folder, ["4"])


def test_every_readout_with_what_it_costs(greedy_run):
    found = {path["path"]: path for path in evaluate_run(greedy_run.folder, every=True)}
    rim = ["block-4", "4-6", "4-6-7"]
    others = ["4-5-6-7", "2-4-5-6-7", "2-3-4-5-6-7"]
    assert list(found) == ["1-2-3-4-5-6-7", *rim, "stage-1", "stage-2", *others]
    embed, block, head = 64 * 16 + 16, 16 * 16 + 16, 16 * 10 + 10
    for name, path in found.items():
        assert path["blocks"] == {"stage-1": 2, "stage-2": 4, "block-4": 1}.get(name, len(name.split("-")))
        assert path["parameters"] == embed + path["blocks"] * block + head
        assert math.isfinite(path["milliseconds"])
    usual = evaluate_run(greedy_run.folder)
    assert usual == [{key: found[path["path"]][key] for key in path} for path in usual]


def test_a_stages_readout_is_a_path_to_evaluate(greedy_run):
    test, rule = greedy_run.recipe.splits(None).test, load_rule(greedy_run)
    network, head = rule.network, rule.own_readouts[0].head
    logits = head(network.blocks[1](network.blocks[0](network.embed(test.inputs))))
    share = (logits.argmax(-1) == test.labels).float().mean().item()
    (result,) = evaluate_run(greedy_run.folder, ["stage-1"])
    assert result == {"path": "stage-1", "blocks": 2, "accuracy": pytest.approx(share)}


@pytest.mark.parametrize("name", ["ff", "dgl"])
def test_local_rules_have_the_readouts_that_they_train(tmp_path, name):
    trained(tmp_path, name)
    names = [path["path"] for path in evaluate_run(tmp_path, every=True)]
    assert names == ["1-2-3", *{"ff": ["goodness"], "dgl": ["stage-1", "stage-2"]}[name], "block-2", "2-3"]


@torch.no_grad()
def test_leaving_early_is_calibrated_on_half_of_the_samples_and_measured_on_the_rest(greedy_run):
    test, rule = greedy_run.recipe.splits(None).test, load_rule(greedy_run)
    chain, *rim = rule.network.readouts
    results = evaluate_exits(greedy_run.folder, [0.0, 0.05])
    assert [(found["exits"], found["loss"]) for found in results] == [
        (exits, loss) for exits in ("stages", "rim") for loss in (0.0, 0.05)
    ]
    for found in results:
        readouts, blocks = (rule.exits, [2, 4, 7]) if found["exits"] == "stages" else ([*rim, chain], [1, 2, 3, 10])
        logits = torch.stack([rule.network(test.inputs, path=readout) for readout in readouts])
        right = logits.argmax(-1) == test.labels
        threshold = calibrate(confidence(logits)[:, ::2], right[:, ::2], found["loss"])
        blocks = torch.tensor(blocks).double()
        if blocks[first_exits(confidence(logits)[:, ::2], threshold)].mean() >= 7:  # straight to the chain
            threshold, blocks = math.inf, torch.full((len(readouts),), 7.0)
        exits = first_exits(confidence(logits)[:, 1::2], threshold)
        kept = right[:, 1::2].gather(0, exits[None]).double().mean().item()
        assert found["threshold"] == (None if math.isinf(threshold) else pytest.approx(threshold))
        assert found["accuracy"] == pytest.approx(kept)
        assert found["full_accuracy"] == pytest.approx(right[-1, 1::2].double().mean().item())
        assert found["blocks"] == pytest.approx(blocks[exits].mean().item())
        assert found["full_blocks"] == 7
        shares = (exits == torch.arange(len(readouts))[:, None]).double().mean(1).tolist()
        assert list(found["shares"].values()) == pytest.approx(shares)
        assert list(found["shares"]) == [readout.name for readout in readouts]
    assert {found["threshold"] is None for found in results} == {True, False}


def test_validation_samples_calibrate_where_there_are_any(tmp_path):
    recipe = RECIPES["digits"](blocks=3, width=16, epochs=2, validation_samples=200)
    run = Run(recipe=recipe, method="paper", seed=0, folder=tmp_path)
    train(run)
    splits, rule = recipe.splits(None), load_rule(run)
    chain, *rim = rule.network.readouts
    with torch.no_grad():
        valid, test = (
            torch.stack([rule.network(part.inputs, path=readout) for readout in [*rim, chain]])
            for part in (splits.valid, splits.test)
        )
    threshold = calibrate(confidence(valid), valid.argmax(-1) == splits.valid.labels, 0.02)
    exits = first_exits(confidence(test), threshold)
    (found,) = [one for one in evaluate_exits(tmp_path, [0.02]) if one["exits"] == "rim"]
    right = test.argmax(-1) == splits.test.labels
    assert found["accuracy"] == pytest.approx(right.gather(0, exits[None]).double().mean().item())
    assert found["full_accuracy"] == pytest.approx(right[-1].double().mean().item())


def test_a_run_is_measured_on_images_that_it_was_not_trained_for(tmp_path):
    shares = {"test_missing": 0.5, "test_label_noise": 0.2}
    clean = trained(tmp_path / "clean", "greedy", stage=(1, 2))
    expected = trained(tmp_path / "corrupted", "greedy", stage=(1, 2), **shares)  # which is trained alike
    assert evaluate_run(clean.folder, corruption=shares) == evaluate_run(expected.folder) != evaluate_run(clean.folder)
    assert evaluate_exits(clean.folder, [0.01], corruption=shares) == evaluate_exits(expected.folder, [0.01])
    assert evaluate_run(expected.folder, corruption=dict.fromkeys(shares, 0.0)) == evaluate_run(clean.folder)


def test_what_cannot_leave_early_is_told(tmp_path):
    trained(tmp_path, "dfa", blocks=1)
    with pytest.raises(ValueError, match="dfa on digits has no readout to leave at before the chain's"):
        evaluate_exits(tmp_path, [0.01])


def test_a_checkpoint_of_another_architecture_is_told(run, tmp_path):
    other = trained(tmp_path / "other", "bp", blocks=2)
    run.checkpoint_file.write_bytes(other.checkpoint_file.read_bytes())
    with pytest.raises(ValueError, match="is of another run, with --"):
        evaluate_run(run.folder)
