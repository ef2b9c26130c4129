"""Runs on several processes. Oracle: the rule in one process, an optimizer for every stage."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from tests.training import ROOT, free_port
from torch.nn.utils import clip_grad_norm_

from hbll import cli
from hbll.train import checkpoint, metrics
from hbll.train.evaluate import evaluate_run
from hbll.train.feed import Feed
from hbll.train.loop import train
from hbll.train.optimizers import make_optimizers
from hbll.train.run import Run, open_run
from hbll.train.schedule import scheduler

DIGITS = ["train", "digits", "--stage", 2, 3, "--blocks", 5, "--width", 16, "--train-samples", 1200]
SMALL = [*DIGITS[:-1], 300]
TUNED = ["--gradient-clip", 0.5, "--schedule", "cosine", "--epochs", 12]
STREAM = [*DIGITS, *TUNED, "--rule", "stream", "--refresh", 3, "--parallel", "stages"]


@pytest.fixture(scope="module")
def whole(launcher, tmp_path_factory):
    """A run that nothing disturbs, and what its processes said."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    ended = launcher.run(2, *STREAM, "--run-dir", folder)
    assert [one.code for one in ended] == [0, 0], ended
    return open_run(folder), ended


def in_one_process(run, epochs):
    """The weights after each of so many epochs, at whose ends the pipeline is drained."""
    recipe, samples = run.recipe, run.recipe.splits(None).train
    rule = recipe.rule(run.method, recipe.initial_network(run.seed), samples[:4].inputs)
    feed = Feed(run, samples)
    network = set(rule.network.parameters())
    stages = {}
    for n in range(1, len(rule.stages) + 1):
        own = [p for module in rule.own(n) for p in module.parameters()]
        (optimizer,) = make_optimizers(
            rule, recipe.optimizer, recipe.learning_rate, recipe.weight_decay, parameters=own
        )
        groups = [[p for p in own if p in network], [p for p in own if p not in network]]
        steps = recipe.epochs * feed.steps_per_epoch
        stages[n] = optimizer, scheduler(recipe.schedule, optimizer, steps), groups
    found = []
    for epoch in range(epochs):
        order = feed.order(epoch)
        given = [batch for k in range(feed.steps_per_epoch) for batch in feed.batches(order, epoch, k)]
        while given or rule.in_flight:
            for optimizer, _, _ in stages.values():
                optimizer.zero_grad()
            step = rule.backward(*(given.pop(0) if given else (None, None)))
            for n in step.reports:
                optimizer, schedule, groups = stages[n]
                for parameters in groups:
                    if recipe.gradient_clip:
                        clip_grad_norm_(parameters, recipe.gradient_clip)
                optimizer.step()
                schedule.step()
        found.append({name: tensor.clone() for name, tensor in rule.state_dict().items()})
    return found


def weights(run):
    return checkpoint.load(run.checkpoint_file)["rule"]


def same(found, expected):
    return found.keys() == expected.keys() and all(found[name].equal(expected[name]) for name in expected)


def lines(run):
    """The metrics of the epochs, but for the time they took."""
    return [{**vars(line), "seconds": 0} for line in metrics.read(run.metrics_file)]


def test_stages_in_processes_come_to_what_they_do_in_one(whole):
    run, (first, second) = whole
    assert same(weights(run), in_one_process(run, run.recipe.epochs)[-1])
    assert [line.epoch for line in metrics.read(run.metrics_file)] == list(range(1, 13))
    last = metrics.read(run.metrics_file)[-1]
    assert evaluate_run(run.folder)[0] == last.chain
    assert last.loss == pytest.approx(sum(report["error"] for report in last.nodes.values()))
    saved = run.recipe.initial_network(1)
    saved.load(run.model_folder)
    assert all(weights(run)[f"network.{name}"].equal(tensor) for name, tensor in saved.state_dict().items())
    assert "epoch 12/12" in first.err
    assert f"run: {run.folder}" in first.out
    assert (second.out, second.err) == ("", "")


def wait_for(there):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not there():
        time.sleep(0.001)


def wait_for_lines(file, count):
    wait_for(lambda: file.exists() and file.read_bytes().count(b"\n") >= count)


def test_a_killed_stage_ends_the_others_and_the_run_goes_on(launcher, whole, tmp_path):
    run, _ = whole
    draw = random.Random(0)
    for killed in (0, 1):
        folder = tmp_path / str(killed)
        pids = launcher.start(2, *STREAM, "--run-dir", folder, "--timeout", 20)
        wait_for_lines(folder / "metrics.jsonl", draw.randrange(1, 8))
        time.sleep(draw.random() / 20)
        os.kill(pids[killed], signal.SIGKILL)
        ended = launcher.wait(pids)
        other, n = ended[1 - killed], 2 - killed
        assert (ended[killed].code, other.code) == (-signal.SIGKILL, 2), ended
        *progress, told = other.err.splitlines()
        assert all(line.startswith("epoch ") for line in progress)
        assert told.startswith(f"hbll: stage {n}: ")
        assert f"its checkpoint {folder}/stage-{n}.safetensors has seen " in told
        assert told.endswith(f"start all processes again with --run-dir {folder} --resume")
        assert not list(folder.glob("*.unfinished"))
        ended = launcher.run(2, "train", "digits", "--run-dir", folder, "--resume")
        assert [one.code for one in ended] == [0, 0], ended
        assert same(weights(open_run(folder)), weights(run))
        assert lines(open_run(folder)) == lines(run)


def test_sigterm_ends_all_and_each_goes_on_in_a_folder_of_its_own(launcher, whole, tmp_path):
    run, _ = whole
    folders = [tmp_path / "first", tmp_path / "second"]
    pids = launcher.start(2, *STREAM, folders=folders)
    wait_for_lines(folders[0] / "metrics.jsonl", 2)
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    ended = launcher.wait(pids)
    assert [one.code for one in ended] == [130, 130], ended
    for n, one in enumerate(ended, 1):
        assert f"hbll: stage {n}: stopped; its checkpoint {folders[n - 1]}/stage-{n}.safetensors has seen " in one.err
    assert not (folders[0] / "stage-2.safetensors").exists()
    ended = launcher.run(2, "train", "digits", "--resume", folders=folders)
    assert [one.code for one in ended] == [0, 0], ended
    assert same(weights(open_run(folders[0])), weights(run))
    assert lines(open_run(folders[0])) == lines(run)
    assert not metrics.read(folders[1] / "metrics.jsonl")


def test_replicas_of_stages_share_batches_and_may_be_fewer_when_the_run_goes_on(launcher, tmp_path):
    options = [*SMALL, "--rule", "stream", "--parallel", "stages", "--run-dir", tmp_path / "run"]
    for world, epochs in ((4, 1), (2, 2)):
        ended = launcher.run(world, *options, "--epochs", epochs, *(["--resume"] if epochs == 2 else []))
        assert [one.code for one in ended] == [0] * world, ended
    run = open_run(tmp_path / "run")
    for name, expected in in_one_process(run, 2)[-1].items():
        torch.testing.assert_close(weights(run)[name], expected, rtol=0, atol=1e-5)
    assert [line.epoch for line in metrics.read(run.metrics_file)] == [1, 2]


@pytest.mark.parametrize(
    ("rule", "parallel"), [("bp", "data"), ("stream", "data"), ("paper", "stages"), ("tree", "stages")]
)
def test_replicas_of_a_network_and_parts_of_a_tree_learn_as_one_process_does(launcher, tmp_path, rule, parallel):
    clip = TUNED[:2] if parallel == "data" else []  # parts are cut down each by itself
    options = [*SMALL[5:], *clip, "--accumulate", 2, "--epochs", 2, "--rule", rule, "--parallel", parallel]
    ended = launcher.run(2, "train", "digits", *options, "--run-dir", tmp_path / "two")
    assert [one.code for one in ended] == [0, 0], ended
    two = open_run(tmp_path / "two")
    one = Run(recipe=two.recipe, method=rule, seed=0, folder=tmp_path / "one")
    train(one)
    for name, expected in weights(one).items():
        torch.testing.assert_close(weights(two)[name], expected, rtol=0, atol=1e-5)
    first, second = (metrics.read(run.metrics_file)[-1] for run in (one, two))
    assert second.loss == pytest.approx(first.loss, abs=1e-5)
    assert second.chain["accuracy"] == pytest.approx(first.chain["accuracy"], abs=0.01)
    if parallel == "data":
        assert (second.work, second.span) == (first.work, first.span)


@pytest.mark.parametrize("rule", ["solo", "greedy", "dgl", "predsim", "cff"])
def test_rules_whose_stages_learn_by_themselves_are_for_processes(launcher, tmp_path, rule):
    ended = launcher.run(
        2, *SMALL, "--epochs", 1, "--rule", rule, "--parallel", "stages", "--run-dir", tmp_path / "run"
    )
    assert [one.code for one in ended] == [0, 0], ended
    run = open_run(tmp_path / "run")
    assert evaluate_run(run.folder)[0] == metrics.read(run.metrics_file)[-1].chain


def test_the_weights_that_validate_best_are_kept(launcher, tmp_path):
    options = [*SMALL, "--rule", "stream", "--parallel", "stages", "--learning-rate", 2, "--validation-samples", 100]
    ended = launcher.run(2, *options, "--epochs", 10, "--run-dir", tmp_path / "run")
    assert [one.code for one in ended] == [0, 0], ended
    run = open_run(tmp_path / "run")
    values = [line.validation["accuracy"] for line in metrics.read(run.metrics_file)]
    best = values.index(max(values))
    assert best < 9  # else the last ones would do
    after = in_one_process(run, 10)
    assert same(checkpoint.load(run.best_file)["rule"], after[best])
    assert checkpoint.load(run.best_file)["epoch"] == best + 1
    assert same(weights(run), after[9])


def test_a_run_that_goes_on_has_no_old_weights_for_its_own(launcher, tmp_path):
    folder = tmp_path / "run"
    options = [*SMALL, "--rule", "stream", "--parallel", "stages", "--run-dir", folder]
    assert [one.code for one in launcher.run(2, *options, "--epochs", 1)] == [0, 0]
    assert open_run(folder).checkpoint_file.exists()
    pids = launcher.start(2, "train", "digits", "--run-dir", folder, "--resume", "--epochs", 1000)
    wait_for_lines(folder / "metrics.jsonl", 2)
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    assert [one.code for one in launcher.wait(pids)] == [130, 130]
    with pytest.raises(ValueError, match="its stages are put together at the end of the run"):
        evaluate_run(folder)


def test_a_beginning_that_came_to_nothing_leaves_nothing_behind(launcher, whole, tmp_path):
    run, _ = whole
    folder = shutil.copytree(run.folder, tmp_path / "run")
    for file in folder.iterdir():
        if file.name not in ("stage-1.safetensors", "stage-2.safetensors"):
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    options = [*DIGITS, "--rule", "stream", "--parallel", "stages", "--epochs", 3]  # of another run
    pids = launcher.start(2, *options, "--run-dir", folder)
    wait_for(lambda: (folder / "configuration.json").exists())
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    launcher.wait(pids)
    ended = launcher.run(2, "train", "digits", "--run-dir", folder, "--resume")
    assert [one.code for one in ended] == [0, 0], ended


APART = (
    "hbll: by Scan the loss of a stage reaches other stages, or waits for them: stages in processes of their own are for "
    "stream with copies, greedy, solo, dgl, predsim and cff, and subtrees of them, by hbll.distributed.TreeWorker, for "
    "paper and tree\n"
)
COUNTS = (
    "hbll: the network is cut into 2 stages, and there are {} processes: start 2, or a multiple, or begin a run with "
    "another --stage\n"
)
SHARES = "hbll: --batch-size 15 is of all replicas together, and 2 cannot share it evenly\n"
TREE = "hbll: the tree is of 3 stages: start as many processes at most, not 4\n"
NOISE = "hbll: noise on targets is drawn from one generator for all nodes: leave noise= out, or train in one process\n"
NO_GPUS = "hbll: nccl needs a GPU for each of the 2 processes of a machine, which has 0: take gloo\n"


@pytest.mark.parametrize(
    ("world", "arguments", "sentence"),
    [
        (2, ["--rule", "scan"], APART),
        (4, ["--rule", "paper", "--blocks", 3, "--stage", 1], TREE),
        (2, ["--rule", "tree", "--noise", 0.1], NOISE),
        (3, ["--rule", "stream"], COUNTS.format(3)),
        (1, ["--rule", "stream"], COUNTS.format(1)),
        (4, ["--rule", "stream", "--batch-size", 15], SHARES),
        (2, ["--rule", "stream", "--backend", "nccl"], NO_GPUS),
    ],
)
def test_what_cannot_be_is_told_by_every_process(launcher, tmp_path, world, arguments, sentence):
    if "nccl" in arguments and torch.cuda.is_available():
        pytest.skip("there are GPUs")
    ended = launcher.run(world, *SMALL, *arguments, "--parallel", "stages", "--run-dir", tmp_path / "run")
    assert [(one.code, one.err) for one in ended] == [(2, sentence)] * world
    assert not (tmp_path / "run" / "configuration.json").exists()


def test_processes_that_were_told_differently_say_so(launcher, tmp_path):
    port = free_port()
    options = [*SMALL, "--rule", "greedy", "--parallel", "stages", "--run-dir", tmp_path / "run", "--epochs"]
    first, second = (launcher.start(2, *options, 2 + rank, "--timeout", 3, ranks=[rank], port=port) for rank in (0, 1))
    ended = launcher.wait([*first, *second])
    assert [one.code for one in ended] == [2, 2]
    assert ended[1].err == "hbll: --epochs is 3 in this process and 2 in the first one: start all alike\n"


def test_a_process_that_never_comes_is_waited_for_no_longer_than_was_said(launcher):
    for rank in (0, 1):
        port = free_port()
        (ended,) = launcher.run(2, *STREAM, "--timeout", 1, ranks=[rank], port=port)
        assert ended.code == 2
        (told,) = ended.err.splitlines()
        assert told.startswith(f"hbll: process {rank} of 2 did not meet the others at 127.0.0.1:{port} within 1 second")


def test_a_port_in_use_is_told(launcher):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        ended = launcher.run(2, *STREAM, "--timeout", 2, port=port)
    assert [one.code for one in ended] == [2, 2]
    assert (
        ended[0].err.splitlines()[-1]
        == f"hbll: another program listens at 127.0.0.1:{port}, where the processes were to meet: give another MASTER_PORT"
    )
    assert f"hbll: process 1 of 2 did not meet the others at 127.0.0.1:{port}" in ended[1].err


def test_a_stage_that_does_not_answer_is_given_up(launcher, tmp_path):
    pids = launcher.start(2, *STREAM, "--timeout", 2, "--run-dir", tmp_path / "run")
    wait_for_lines(tmp_path / "run" / "metrics.jsonl", 1)
    os.kill(pids[1], signal.SIGSTOP)
    (ended,) = launcher.wait(pids[:1], seconds=20)
    os.kill(pids[1], signal.SIGKILL)
    launcher.wait(pids[1:])
    assert ended.code == 2
    assert "hbll: stage 1: " in ended.err
    assert "ended, or did not answer in time" in ended.err


NAMES = "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"
MEETING = {"WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        ({}, f"several processes are started by torchrun, or by whatever sets {NAMES}: {NAMES} is not set"),
        ({"RANK": "2", **MEETING}, "RANK counts from 0: of 2 processes the last is 1, not 2"),
        ({"RANK": "x", **MEETING}, "RANK is a number; got 'x'"),
    ],
)
def test_what_a_launcher_does_not_say_is_told(capsys, monkeypatch, told, sentence):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in STREAM])
    assert (stop.value.code, capsys.readouterr().err) == (2, f"hbll: {sentence}\n")


def test_processes_that_would_train_a_run_each_are_told(capsys, monkeypatch):
    for name, value in {"RANK": "1", **MEETING}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in SMALL])
    sentence = (
        "a launcher has started 2 processes, each of which would train a run of its own: give --parallel stages or data"
    )
    assert (stop.value.code, capsys.readouterr().err) == (2, f"hbll: {sentence}, or start one\n")


def test_a_timeout_is_above_0(capsys):
    with pytest.raises(SystemExit):
        cli.main([str(argument) for argument in [*STREAM, "--timeout", 0]])
    assert "--timeout must be above 0" in capsys.readouterr().err


def test_under_torchrun(whole, tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        2,
        "--master-port",
        free_port(),
        "-m",
        "hbll",
        *STREAM,
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(word) for word in command], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert same(weights(open_run(folder)), weights(whole[0]))
