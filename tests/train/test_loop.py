import json
import signal
from dataclasses import replace

import pytest
import torch

from hbll.recipes import RECIPES
from hbll.rule import Rule
from hbll.rules import RULES, make_rule
from hbll.train import checkpoint, evaluate, loop, metrics
from hbll.train.divergence import DivergedError
from hbll.train.evaluate import evaluate_run
from hbll.train.hold import held
from hbll.train.loop import Interrupted, train
from hbll.train.run import Run, open_run, read_json, write_json

Digits = RECIPES["digits"]
SMALL = Digits(blocks=3, width=8, epochs=3, train_samples=300, learning_rate=1e-3)  # four steps an epoch


class Noisy(Digits):
    """Digits with a rule that draws random numbers in every step."""

    def rule(self, method, network, example):
        return make_rule(method, network, example, noise=0.1)


class Shaken(Digits):
    """Digits whose images are varied anew in every step."""

    def augment(self, inputs, draw):
        return inputs + torch.from_numpy(draw.normal(0, 0.1, inputs.shape)).float()


class Poisoned(Digits):
    """Digits in which one training sample is not a number."""

    def load(self, data_dir):
        splits = super().load(data_dir)
        splits.train.inputs[70, 3] = float("nan")
        return splits


def run_in(folder, recipe=SMALL, method="paper", seed=0):
    return Run(recipe=recipe, method=method, seed=seed, folder=folder)


def outcome(run):
    """All that a run leaves behind but the time it took."""
    state = checkpoint.load(run.checkpoint_file)
    lines = [replace(line, seconds=0.0) for line in metrics.read(run.metrics_file)]
    weights = {name: tensor.tolist() for name, tensor in state["rule"].items()}
    optimizers = state["descent"]["optimizers"]
    moments = {
        (number, index, name): tensor.tolist()
        for number, optimizer in enumerate(optimizers)
        for index, moment in optimizer["state"].items()
        for name, tensor in moment.items()
    }
    rates = [group["lr"] for optimizer in optimizers for group in optimizer["param_groups"]]
    return weights, moments, rates, _plain(state["carry"]), state["random"].tolist(), lines


def _plain(nest):
    return torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.tolist, nest)


def stop_at(step, how):
    """An `on_step` that stops the run before that step, counted from the beginning of the run."""

    def on_step(done, steps):
        if done == step:
            how()

    return on_step


def press_ctrl_c():
    signal.raise_signal(signal.SIGINT)


def be_killed():
    raise SystemError


@pytest.mark.parametrize(
    ("recipe", "method", "step"),
    [(SMALL, "paper", step) for step in (0, 3, 4)]
    + [(SMALL, method, 6) for method in RULES]
    + [
        (replace(SMALL, schedule="cosine"), "bp", 6),
        (replace(SMALL, schedule="linear"), "bp", 6),
        (replace(SMALL, optimizer="muon", schedule="linear", gradient_clip=1.0), "scan", 6),
        (replace(SMALL, optimizer="nadam"), "2bw", 6),
        (replace(SMALL, optimizer="muon", error_feedback=True, schedule="cosine"), "2bw", 6),
        (Noisy(**vars(SMALL)), "paper", 6),
        (Shaken(**vars(SMALL)), "paper", 6),
        (Shaken(**vars(replace(SMALL, accumulate=2, precision="bfloat16", validation_samples=100))), "stream", 3),
    ],
)
def test_an_interrupted_run_ends_as_one_that_was_not(tmp_path, recipe, method, step):
    whole, stopped = run_in(tmp_path / "whole", recipe, method), run_in(tmp_path / "stopped", recipe, method)
    train(whole)
    with pytest.raises(Interrupted):
        train(stopped, on_step=stop_at(step, press_ctrl_c))
    torch.manual_seed(99)  # another process would have other random numbers
    train(stopped, resume=True)
    assert outcome(stopped) == outcome(whole)


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 9])
def test_a_run_stopped_while_it_is_measured_ends_as_one_that_was_not(tmp_path, monkeypatch, batch):
    """By the second batch of the test samples of an epoch, by the validation samples, in the last epoch: at once."""
    monkeypatch.setattr(evaluate, "BATCH_SIZE", 200)
    recipe = Shaken(**vars(replace(SMALL, validation_samples=100)))
    whole, stopped = run_in(tmp_path / "whole", recipe, "scan"), run_in(tmp_path / "stopped", recipe, "scan")
    batches = []
    train(whole, on_batch=lambda done, of: batches.append((done, of)))
    assert batches == 3 * [(1, 2), (2, 2), (1, 1)]
    batches.clear()

    def on_batch(done, of):
        batches.append((done, of))
        if len(batches) == batch:
            press_ctrl_c()

    with pytest.raises(Interrupted):
        train(stopped, on_batch=on_batch)
    assert len(batches) == batch
    torch.manual_seed(99)
    train(stopped, resume=True)
    assert outcome(stopped) == outcome(whole)


@pytest.mark.parametrize(("method", "step"), [("stream", 6), ("scan", 9)])
def test_a_long_epoch_is_saved_on_the_way(tmp_path, monkeypatch, method, step):
    whole, killed = run_in(tmp_path / "whole", method=method), run_in(tmp_path / "killed", method=method)
    train(whole)
    monkeypatch.setattr(loop, "SAVE_EVERY", 0)
    with pytest.raises(SystemError):
        train(killed, on_step=stop_at(step, be_killed))
    state = checkpoint.load(killed.checkpoint_file)
    assert 4 * state["epoch"] + state["position"] == step - 1  # all but the step that was under way
    train(killed, resume=True)
    assert outcome(killed) == outcome(whole)


def test_short_epochs_are_saved_at_their_ends_alone_and_longer_ones_every_so_often(tmp_path, monkeypatch):
    seconds, saved = [0.0], []
    monkeypatch.setattr(loop.time, "monotonic", lambda: seconds[0])
    monkeypatch.setattr(loop, "SAVE_EVERY", 600.0)
    save = checkpoint.save

    def noted(file, state):
        saved.append((state["epoch"], state["position"]))
        save(file, state)

    monkeypatch.setattr(checkpoint, "save", noted)
    for a_step, expected in ((149.0, []), (250.0, [2]), (400.0, [1, 3])):
        saved.clear()

        def on_step(done, steps, a_step=a_step):
            seconds[0] += a_step

        train(run_in(tmp_path / str(a_step)), on_step=on_step)
        ends = [(epoch, 0) for epoch in range(4)]
        assert saved == sorted([*ends, *((epoch, position) for epoch in range(3) for position in expected)])


def test_batches_that_accumulate_are_a_step_on_all_of_them(tmp_path):
    recipe = replace(SMALL, optimizer="adamw", epochs=1, train_samples=256)
    whole, parts = (
        run_in(tmp_path / "whole", recipe, "bp"),
        run_in(tmp_path / "parts", replace(recipe, batch_size=16, accumulate=4), "bp"),
    )
    for run in (whole, parts):
        train(run)
    one, other = (checkpoint.load(run.checkpoint_file)["rule"] for run in (whole, parts))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=1e-5)
    (line,), (accumulated,) = (metrics.read(run.metrics_file) for run in (whole, parts))
    assert accumulated.loss == pytest.approx(line.loss, rel=1e-4)
    assert accumulated.work == 4 * line.work


def test_steps_are_lowered_to_the_precision(tmp_path):
    seen = []

    class Watched(Digits):
        def network(self):
            network = super().network()
            network.head.register_forward_hook(lambda head, inputs, output: seen.append((head.training, output.dtype)))
            return network

    options = vars(replace(SMALL, epochs=1))
    train(run_in(tmp_path / "low", Watched(**{**options, "precision": "bfloat16"}), "bp"))
    assert {dtype for training, dtype in seen if training} >= {torch.bfloat16}
    assert {dtype for training, dtype in seen if not training} == {torch.float32}


def test_the_weights_best_by_the_validation_samples_are_kept(tmp_path, monkeypatch):
    recipe = replace(SMALL, epochs=8, validation_samples=100, learning_rate=0.03)
    run, states = run_in(tmp_path, recipe, "bp"), []
    train(run, on_epoch=lambda line: states.append(checkpoint.load(run.checkpoint_file)["rule"]))
    values = [line.validation["accuracy"] for line in metrics.read(run.metrics_file)]
    first_best = values.index(max(values))
    kept = checkpoint.load(run.best_file)
    assert kept["epoch"] == first_best + 1
    assert all(tensor.equal(kept["rule"][name]) for name, tensor in states[first_best].items())
    assert evaluate_run(tmp_path, best=True) == metrics.read(run.metrics_file)[first_best].paths
    assert evaluate_run(tmp_path) == metrics.read(run.metrics_file)[-1].paths


def test_without_validation_samples_there_is_no_best(tmp_path):
    train(run_in(tmp_path, replace(SMALL, epochs=1)))
    with pytest.raises(ValueError, match=r"has no best\.safetensors: no epoch of it was measured on validation"):
        evaluate_run(tmp_path, best=True)


def test_samples_are_varied_anew_in_every_step_and_alike_for_every_method(tmp_path):
    seen = {}

    class Watched(Shaken):
        def augment(self, inputs, draw):
            varied = super().augment(inputs, draw)
            batches.append((inputs, varied))
            return varied

    for method in ("paper", "bp"):
        batches = seen[method] = []
        train(run_in(tmp_path / method, Watched(**vars(replace(SMALL, batch_size=300))), method))
    changes = [varied - inputs for inputs, varied in seen["paper"]]
    assert len(changes) == 3
    assert all(changes[0].abs().mean() < 0.2 < (changes[0] - other).abs().sum() for other in changes[1:])
    for (_, mine), (_, other) in zip(seen["paper"], seen["bp"], strict=True):
        assert mine.equal(other)


def test_a_killed_run_goes_on_from_its_last_epoch(tmp_path):
    whole, killed = run_in(tmp_path / "whole"), run_in(tmp_path / "killed")
    train(whole)
    with pytest.raises(SystemError):
        train(killed, on_step=stop_at(6, be_killed))
    assert checkpoint.load(killed.checkpoint_file)["epoch"] == 1
    train(killed, resume=True)
    assert outcome(killed) == outcome(whole)


def test_a_line_written_before_its_checkpoint_is_written_once(tmp_path):
    run = run_in(tmp_path)
    with pytest.raises(Interrupted):
        train(run, on_step=stop_at(6, press_ctrl_c))
    (line,) = metrics.read(run.metrics_file)
    metrics.append(run.metrics_file, replace(line, epoch=2))
    train(run, resume=True)
    assert [line.epoch for line in metrics.read(run.metrics_file)] == [1, 2, 3]


def test_a_run_with_a_constant_rate_can_be_prolonged(tmp_path):
    whole, prolonged = run_in(tmp_path / "whole"), run_in(tmp_path / "prolonged", replace(SMALL, epochs=1))
    train(whole)
    train(prolonged)
    train(replace(prolonged, recipe=SMALL), resume=True)
    assert outcome(prolonged) == outcome(whole)
    assert open_run(tmp_path / "prolonged").recipe == SMALL


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    run = run_in(tmp_path)
    train(run)
    before = outcome(run)
    train(run, resume=True)
    assert outcome(run) == before


@pytest.mark.parametrize(
    ("change", "option"),
    [
        ({"width": 16}, "--width 8, not 16"),
        ({"learning_rate": 0.1}, "--learning-rate 0.001, not 0.1"),
        ({"epochs": 2}, "--epochs 3, not 2"),
        ({"schedule": "cosine"}, "--schedule constant, not cosine"),
        ({"schedule": "cosine", "epochs": 5}, "--epochs 3, not 5"),
    ],
)
def test_a_run_is_resumed_as_it_was_begun(tmp_path, change, option):
    train(run_in(tmp_path, replace(SMALL, epochs=3)))
    with pytest.raises(ValueError, match=option):
        train(run_in(tmp_path, replace(SMALL, **change)), resume=True)


def test_the_method_and_the_seed_belong_to_a_run(tmp_path):
    train(run_in(tmp_path))
    with pytest.raises(ValueError, match="--method paper, not bp"):
        train(run_in(tmp_path, method="bp"), resume=True)
    with pytest.raises(ValueError, match="--seed 0, not 1"):
        train(run_in(tmp_path, seed=1), resume=True)


def test_a_run_is_never_trained_over(tmp_path):
    train(run_in(tmp_path))
    before = outcome(run_in(tmp_path))
    with pytest.raises(ValueError, match="holds a run already"):
        train(run_in(tmp_path))
    assert outcome(run_in(tmp_path)) == before


def test_there_is_nothing_to_resume_in_an_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="is not the folder of a run"):
        train(run_in(tmp_path), resume=True)
    assert not list(tmp_path.iterdir())


def test_a_run_under_way_is_neither_resumed_nor_begun_again(tmp_path):
    run = run_in(tmp_path)

    def meddle():
        with pytest.raises(ValueError, match="is being written by process"):
            train(run, resume=True)
        with pytest.raises(ValueError, match="holds a run already"):
            train(run)

    train(run, on_step=stop_at(6, meddle))
    assert [line.epoch for line in metrics.read(run.metrics_file)] == [1, 2, 3]


def test_a_folder_in_which_another_process_is_about_to_begin_is_left_to_it(tmp_path):
    with held(tmp_path), pytest.raises(ValueError, match="is being written by process"):
        train(run_in(tmp_path))


def test_metrics_of_another_run_are_told_and_left(tmp_path):
    ours, theirs = run_in(tmp_path / "ours"), run_in(tmp_path / "theirs", seed=1)
    for run in (ours, theirs):
        train(run)
    ours.metrics_file.write_bytes(theirs.metrics_file.read_bytes())
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged, or of another run"):
        train(ours, resume=True)
    assert ours.metrics_file.read_bytes() == theirs.metrics_file.read_bytes()


def test_a_checkpoint_of_another_run_is_neither_resumed_nor_evaluated(tmp_path):
    ours, theirs = run_in(tmp_path / "ours"), run_in(tmp_path / "theirs", seed=1)
    for run in (ours, theirs):
        train(run)
    ours.checkpoint_file.write_bytes(theirs.checkpoint_file.read_bytes())
    with pytest.raises(ValueError, match="is of another run, with --seed 1, not 0"):
        train(ours, resume=True)
    with pytest.raises(ValueError, match="is of another run, with --seed 1, not 0"):
        evaluate_run(ours.folder)


@pytest.mark.parametrize("epoch", [1, 3])
def test_what_stops_it_in_an_evaluation_is_heard_after_it(tmp_path, epoch):
    whole, stopped = run_in(tmp_path / "whole"), run_in(tmp_path / "stopped")
    train(whole)

    def terminate(line):
        if line.epoch == epoch:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(stopped, on_epoch=terminate)
    train(stopped, resume=True)
    assert outcome(stopped) == outcome(whole)


def test_the_configuration_says_what_was_run_and_with_what(tmp_path):
    run = run_in(tmp_path)
    train(run)
    configuration = json.loads(run.configuration_file.read_text())
    assert configuration["recipe"] == "digits"
    assert configuration["options"]["train_samples"] == 300
    assert configuration["block_count"] == 3
    assert configuration["versions"]["torch"] == torch.__version__
    assert configuration["engine"] in ("loop", "batched")
    assert open_run(tmp_path) == run


def test_a_run_of_another_version_is_told(tmp_path):
    run = run_in(tmp_path)
    train(run)
    configuration = read_json(tmp_path, "configuration.json", "run")
    for change in ({"recipe": "letters"}, {"options": {"letters": 26}}):
        write_json(run.configuration_file, configuration | change)
        with pytest.raises(ValueError, match=r"was made by another version: .*letters.* is not known here"):
            open_run(tmp_path)


def test_every_epoch_is_measured(tmp_path):
    run = run_in(tmp_path, method="bp")
    heard = []
    train(run, on_epoch=heard.append)
    lines = metrics.read(run.metrics_file)
    assert lines == heard
    assert [line.epoch for line in lines] == [1, 2, 3]
    for line in lines:
        assert [path["path"] for path in line.paths] == ["1-2-3", "block-2", "2-3"]
        assert list(line.nodes) == ["1"]  # the whole network is one stage
        assert line.nodes["1"]["cosine"] == pytest.approx(1)
        assert (line.work, line.span) == (9, 6)  # backpropagation on three blocks: 3 (N - 1) and 2 (N - 1)
        assert line.defect is None
        assert line.seconds > 0
        assert line.learning_rate == 1e-3
    assert lines[-1].loss < lines[0].loss


@pytest.mark.parametrize("part", ["sums", "rule", "descent"])
def test_a_checkpoint_of_another_version_is_told(tmp_path, part):
    run = run_in(tmp_path, method="stream")
    train(run)
    state = checkpoint.load(run.checkpoint_file)
    checkpoint.save(run.checkpoint_file, state | {part: {"letters": 26}})
    with pytest.raises(
        ValueError,
        match=r"checkpoint\.safetensors is of another network or was made by another version.*: begin a new run",
    ):
        train(replace(run, recipe=replace(SMALL, epochs=4)), resume=True)


def test_a_checkpoint_of_another_version_cannot_be_evaluated(tmp_path):
    run = run_in(tmp_path, method="bp")
    train(run)
    checkpoint.save(run.checkpoint_file, {"network": checkpoint.load(run.checkpoint_file)["rule"]})
    with pytest.raises(
        ValueError,
        match=r"checkpoint\.safetensors is of another network or was made by another version.*: begin a new run",
    ):
        evaluate_run(tmp_path)


def test_cost_and_defect_are_means_over_the_epoch(tmp_path, monkeypatch):
    taken = []
    backward = Rule.backward

    def recorded(rule, x, y, scale):
        step = backward(rule, x, y, scale)
        taken.append((step.work, step.span, step.defect.item()))
        return step

    monkeypatch.setattr(Rule, "backward", recorded)
    recipe = replace(SMALL, blocks=9, stage=2, sweeps=5, credit_sweeps=5, tolerance=0.02, learning_rate=3e-2)
    run = run_in(tmp_path, recipe, method="scan")
    train(run)
    assert len({work for work, _, _ in taken}) > 1
    for epoch, line in enumerate(metrics.read(run.metrics_file)):
        means = [sum(values) / 4 for values in zip(*taken[4 * epoch : 4 * epoch + 4], strict=True)]
        assert [line.work, line.span, line.defect] == pytest.approx(means)


def test_the_mean_loss_of_the_first_step_is_that_of_a_guess(tmp_path):
    # One step on everything: its loss is the untrained network's.
    recipe = replace(SMALL, epochs=1, batch_size=300)
    run = run_in(tmp_path, recipe, "bp")
    train(run)
    network, samples = recipe.initial_network(0), recipe.splits(None).train
    loss = torch.nn.functional.cross_entropy(network(samples.inputs), samples.labels).item()
    assert metrics.read(run.metrics_file)[0].loss == pytest.approx(loss, rel=1e-5)


def test_seeds_differ_in_their_order_and_epochs_too(tmp_path):
    # With a rate that changes nothing, the losses differ by which 200 of the 300 samples an epoch takes first.
    recipe = replace(SMALL, learning_rate=1e-30, weight_decay=0.0, batch_size=200)
    run = run_in(tmp_path, recipe, "bp")
    train(run)
    losses = [line.loss for line in metrics.read(run.metrics_file)]
    assert len(set(losses)) == 3


@pytest.mark.parametrize("method", RULES)
def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, method):
    run = run_in(tmp_path, Poisoned(**vars(SMALL)), method)
    with pytest.raises(
        DivergedError, match=r"NaN or infinite in step \d of epoch 1, first (at|in the weights of) "
    ) as told:
        train(run)
    assert f"in step {told.value.step} of epoch 1" in str(told.value)
    state = checkpoint.load(run.checkpoint_file)
    assert (state["epoch"], state["position"]) == (0, 0)
    assert all(tensor.isfinite().all() for tensor in state["rule"].values())
    assert metrics.read(run.metrics_file) == []


def test_a_run_that_diverges_later_keeps_the_epochs_it_had(tmp_path):
    run = run_in(tmp_path)
    train(replace(run, recipe=replace(SMALL, epochs=1)))
    state = checkpoint.load(run.checkpoint_file)
    state["rule"]["network.blocks.1.linear.weight"].fill_(3e38)  # finite, unlike what it makes of any state
    checkpoint.save(run.checkpoint_file, state)
    said = "in step 1 of epoch 2, first at block 2; the last good checkpoint is kept"
    with pytest.raises(DivergedError, match=said) as caught:
        train(run, resume=True)
    assert caught.value.step == 5  # four steps an epoch
    assert checkpoint.load(run.checkpoint_file)["epoch"] == 1
    assert len(metrics.read(run.metrics_file)) == 1
