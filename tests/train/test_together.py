"""Runs of several processes that go on in one. Oracles: what the processes had stored; the run in one process all along."""

import json
import os
import shutil
import signal
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from hbll.files import sealed
from hbll.train import checkpoint, metrics
from hbll.train.loop import optimizers_of, train
from hbll.train.run import Run, open_run
from hbll.train.together import put_together

DIGITS = ["train", "digits", "--width", 16, "--train-samples", 300]
STAGES = ["--blocks", 5, "--stage", 2, 3, "--parallel", "stages", "--rule"]


@pytest.fixture
def go_on(alone):
    """Goes on with a run in this process: its exit code, and what it wrote on stderr."""
    return lambda folder, *arguments: alone("train", "digits", "--run-dir", folder, "--resume", *arguments)


def newest(run, stages):
    """The stored states of all stages, of the last epoch that they have in common."""
    states = [[checkpoint.load(file) for file in run.stage_files(n) if file.exists()] for n in range(1, stages + 1)]
    epoch = max(set.intersection(*({state["epoch"] for state in stage} for stage in states)))
    return [next(state for state in stage if state["epoch"] == epoch) for stage in states]


def rule_of(run):
    recipe = run.recipe
    return recipe.rule(run.method, recipe.initial_network(run.seed), recipe.splits(None).train[:4].inputs)


def moments(run, rule, stored, parameters):
    """What stored optimizers have, by the names of parameters, and their groups without them."""
    optimizers = optimizers_of(run.recipe, rule, parameters)
    names = {parameter: name for name, parameter in rule.named_parameters()}
    found, groups = {}, {}
    for optimizer, state in zip(optimizers, stored, strict=True):
        optimizer.load_state_dict(state)
        inside = getattr(optimizer, "optimizer", optimizer)
        for parameter in inside.param_groups[0]["params"]:
            found[names[parameter]] = {**inside.state[parameter], **optimizer.state[parameter]}
        groups[type(inside)] = {**inside.param_groups[0], "params": None}
    return found, groups


def start_and_stop(launcher, folder, *options):
    """A run of two processes that is stopped after an epoch or more."""
    pids = launcher.start(2, *options, "--run-dir", folder)
    ends = time.monotonic() + 60
    while time.monotonic() < ends and not (folder / "metrics.jsonl").exists():
        time.sleep(0.001)
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    ended = launcher.wait(pids)
    assert [one.code for one in ended] == [130, 130], ended


TUNED = ["--gradient-clip", 0.5, "--schedule", "cosine", "--epochs", 20]


@pytest.mark.parametrize(
    "options", [["stream", "--refresh", 3, "--optimizer", "muon", "--error-feedback"], ["predsim"]]
)
def test_one_process_goes_on_with_what_the_stages_had(launcher, go_on, tmp_path, options):
    folder = tmp_path / "run"
    start_and_stop(launcher, folder, *DIGITS, *STAGES, *options, *TUNED)
    stored = open_run(folder)
    states, lines = newest(stored, 2), metrics.read(stored.metrics_file)
    done = states[0]["epoch"]
    rule = rule_of(stored)
    expected, groups = {}, {}
    for n, state in enumerate(states, 1):
        part = nn.ModuleList(rule.own(n))
        part.load_state_dict(state["module"])
        found, of_stage = moments(stored, rule, state["optimizers"], part.parameters())
        assert not expected.keys() & found.keys()
        expected |= found
        groups |= of_stage
    run = replace(stored, parallel="none")
    put_together(run)
    assert open_run(folder) == run
    now = checkpoint.load(run.checkpoint_file)
    assert {name: tensor.tolist() for name, tensor in now["rule"].items()} == {
        name: tensor.tolist() for name, tensor in rule.state_dict().items()
    }
    found, of_whole = moments(run, rule, now["descent"]["optimizers"], None)
    assert found.keys() == expected.keys() == dict(rule.named_parameters()).keys()
    for name, state in expected.items():
        assert found[name].keys() == state.keys()
        assert state
        assert all(found[name][key].equal(value) for key, value in state.items())
    assert of_whole == groups
    assert now["descent"]["schedules"] == states[0]["schedules"] == states[1]["schedules"]
    assert (now["epoch"], now["position"]) == (done, 0)
    clock = {"clock": states[0]["carries"][0]["clock"]}
    assert now["carry"] == ({"stages": [2, 3], "kept": clock} if options[0] == "stream" else {})
    assert not list(folder.glob("stage-*"))
    code, said = go_on(folder)
    assert code == 0, said
    after = metrics.read(run.metrics_file)
    assert [line.epoch for line in after] == list(range(1, 21))
    assert after[:done] == lines[:done]
    assert checkpoint.load(run.checkpoint_file)["epoch"] == 20


@pytest.mark.parametrize(
    "options",
    [
        ["--blocks", 5, "--rule", "bp", "--parallel", "data"],
        ["--depth", 2, "--rule", "tree", "--parallel", "stages"],  # three stages in two processes
    ],
)
def test_what_one_process_does_is_what_it_would_have_done_all_along(launcher, go_on, tmp_path, options):
    folder = tmp_path / "run"
    ended = launcher.run(2, *DIGITS, *options, "--epochs", 1, "--run-dir", folder)
    assert [one.code for one in ended] == [0, 0], ended
    assert go_on(folder, "--epochs", 2, "--parallel", "none") == (0, "epoch 2/2" + said_after(folder, 2))
    run = open_run(folder)
    other = Run(recipe=run.recipe, method=run.method, seed=0, folder=tmp_path / "other")
    train(other)
    saved = run.recipe.initial_network(1)
    saved.load(run.model_folder)
    for name, expected in checkpoint.load(other.checkpoint_file)["rule"].items():
        found = checkpoint.load(run.checkpoint_file)["rule"][name]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        if name.startswith("network."):
            assert saved.state_dict()[name.removeprefix("network.")].equal(found)


def said_after(folder, epoch):
    """What stands behind the number of an epoch."""
    line = metrics.read(folder / "metrics.jsonl")[epoch - 1]
    return f"  loss {line.loss:.4g}  accuracy of the chain {100 * line.chain['accuracy']:.2f} %\n"


@pytest.fixture(scope="module")
def three(launcher, tmp_path_factory):
    """A run of three stages that are alike in shape, with validation samples."""
    folder = tmp_path_factory.mktemp("three") / "run"
    options = ["--blocks", 3, "--stage", 1, "--rule", "cff", "--parallel", "stages", "--epochs", 3]
    ended = launcher.run(3, *DIGITS, *options, "--validation-samples", 100, "--run-dir", folder)
    assert [one.code for one in ended] == [0] * 3, ended
    return folder


def test_the_best_weights_are_kept(three, tmp_path):
    for best in (2, 3):  # of three epochs
        folder = shutil.copytree(three, tmp_path / str(best))
        run = replace(open_run(folder), parallel="none")
        lines = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
        for line in lines:
            line["validation"]["accuracy"] = 0.5 + 0.1 * (line["epoch"] == best)
            line.pop("sha256")
        run.metrics_file.write_text("".join(json.dumps(sealed(line)) + "\n" for line in lines))
        for n, state in enumerate(newest(run, 3), 1):
            checkpoint.save(run.stage_files(n)[0], state | {"metrics": metrics.digest(run.metrics_file)})
            (before,) = (s for s in map(checkpoint.load, run.stage_files(n)) if s["epoch"] == 2)
            checkpoint.save(run.best_stage_file(n), {"run": before["run"], "module": before["module"]})
        rule = rule_of(run)
        for n in (1, 2, 3):
            state = next(s for s in map(checkpoint.load, run.stage_files(n)) if s["epoch"] == best)
            nn.ModuleList(rule.own(n)).load_state_dict(state["module"])
        put_together(run)
        found = checkpoint.load(run.best_file)
        assert found["epoch"] == best
        assert all(found["rule"][name].equal(tensor) for name, tensor in rule.state_dict().items())


def lose(folder):
    for file in folder.glob("stage-2*"):
        file.unlink()


def swap(folder):
    first, second = (folder / f"stage-{n}.safetensors" for n in (2, 3))
    second.write_bytes(first.read_bytes())


def damage(folder):
    content = bytearray((folder / "stage-3.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "stage-3.safetensors").write_bytes(content)


def part(folder):
    (folder / "stage-1-before.safetensors").unlink()
    (folder / "stage-2.safetensors").unlink()


@pytest.mark.parametrize(
    ("spoil", "options", "sentence"),
    [
        (lose, [], "has no stage-2.safetensors: give the folder in which this stage was trained"),
        (swap, [], "stage-3.safetensors is of stage 2, not 3: it is another's"),
        (damage, [], "stage-3.safetensors cannot be read: it is damaged"),
        (part, [], "the stages' checkpoints have no epoch in common: begin a new run"),
        (lambda folder: None, ["--width", 8], "was trained with --width 16, not 8"),
        (lambda folder: None, ["--parallel", "stages"], "several processes are started by torchrun"),
        (lambda folder: None, ["--wait-for-stages", 5], "--wait-for-stages is of several processes"),
    ],
)
def test_what_cannot_be_put_together_is_told_and_nothing_changes(three, go_on, tmp_path, spoil, options, sentence):
    folder = shutil.copytree(three, tmp_path / "run")
    spoil(folder)
    before = {file.name: file.read_bytes() for file in folder.glob("*.*s*")}
    code, said = go_on(folder, "--epochs", 4, *options)
    assert code == 2
    assert sentence in said
    assert said.count("\n") == 1
    assert {file.name: file.read_bytes() for file in folder.glob("*.*s*")} == before


def test_there_is_no_way_back(three, launcher, go_on, tmp_path):
    folder = shutil.copytree(three, tmp_path / "run")
    assert go_on(folder)[0] == 0
    options = ["train", "digits", "--run-dir", folder, "--resume", "--epochs", 4]
    ended = launcher.run(3, *options, "--parallel", "stages")
    said = "was trained with --parallel none, not stages: a run is resumed as it was begun"
    assert [(one.code, said in one.err) for one in ended] == [(2, True)] * 3, ended


def test_parts_of_a_tree_are_as_many_as_before(launcher, tmp_path):
    options = [*DIGITS, "--blocks", 3, "--rule", "tree", "--parallel", "stages", "--epochs", 1]
    ended = launcher.run(3, *options, "--run-dir", tmp_path / "run")
    assert [one.code for one in ended] == [0] * 3, ended
    ended = launcher.run(2, "train", "digits", "--run-dir", tmp_path / "run", "--resume", "--epochs", 2)
    said = "is of a run of 3 processes, not 2: start as many, or go on in one, without a launcher\n"
    assert [(one.code, one.err.endswith(said)) for one in ended] == [(2, True)] * 2, ended
