"""Workers that wait for a lost one. Oracle: a run that nothing disturbs."""

import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from threading import Thread

import pytest
from tests.training import Launcher, free_port

from hbll import cli
from hbll.distributed.rollcall import roll_call
from hbll.train import checkpoint, metrics
from hbll.train.run import CONFIGURATION, open_run
from hbll.train.waiting import TOLD, LostError, waiting

RUN = ["train", "digits", "--blocks", 4, "--width", 16, "--stage", 1, 1, 2, "--train-samples", 300, "--epochs", 30]
RUN += ["--schedule", "cosine", "--rule", "stream", "--refresh", 3, "--parallel", "stages"]


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    found = Launcher(tmp_path_factory.mktemp("processes"))
    yield found
    found.end()


def wait_for(reached):
    deadline = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def begun(folder):
    file = folder / "metrics.jsonl"
    return file.exists() and file.read_bytes().count(b"\n") >= 2


def outcome(folder):
    run = open_run(folder)
    lines = [{**vars(line), "seconds": 0} for line in metrics.read(run.metrics_file)]
    return checkpoint.load(run.checkpoint_file)["rule"], lines


def test_a_run_goes_on_once_those_that_were_lost_are_back(launcher, tmp_path):
    whole, folder, port = tmp_path / "whole", tmp_path / "run", free_port()
    assert [one.code for one in launcher.run(3, *RUN, "--run-dir", whole)] == [0] * 3
    options = [*RUN, "--run-dir", folder, "--wait-for-stages", 60]
    first, second, third = launcher.start(3, *options, port=port)
    wait_for(lambda: begun(folder))
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: all("waiting" in launcher.files[pid][1].read_text() for pid in (second, third)))
    os.kill(third, signal.SIGKILL)  # which waits
    again = launcher.start(3, *options, "--resume", ranks=[0, 2], port=port)
    ended = launcher.wait([second, *again])
    assert [one.code for one in ended] == [0] * 3, ended
    (told,) = ended[0].err.splitlines()
    assert told.startswith("hbll: stage 2: ")
    assert f"its checkpoint {folder}/stage-2.safetensors has seen " in told
    assert told.endswith(
        "epochs; waiting up to 60 seconds for what is lost: start it again by the same command, with "
        f"--run-dir {folder} --resume"
    )
    (weights, lines), (expected, undisturbed) = outcome(folder), outcome(whole)
    assert weights.keys() == expected.keys()
    assert all(weights[name].equal(expected[name]) for name in expected)
    assert lines == undisturbed


def test_what_does_not_come_back_is_waited_for_no_longer_than_was_said(launcher, tmp_path):
    folder = tmp_path / "run"
    pids = launcher.start(3, *RUN, "--run-dir", folder, "--wait-for-stages", 5)
    wait_for(lambda: begun(folder))
    os.kill(pids[1], signal.SIGKILL)
    for n, one in zip((1, 3), launcher.wait([pids[0], pids[2]]), strict=True):
        *_, waits, ends = one.err.splitlines()
        assert one.code == 2
        assert "; waiting up to 5 seconds" in waits
        assert ends.startswith(f"hbll: stage {n}: ")
        assert ends.split("; ")[0] == waits.split("; ")[0]
        assert f"its checkpoint {folder}/stage-{n}.safetensors has seen " in ends
        assert ends.endswith(f": start all processes again with --run-dir {folder} --resume")


def test_what_waits_is_ended_by_sigterm(launcher, tmp_path):
    folder = tmp_path / "run"
    pids = launcher.start(3, *RUN, "--run-dir", folder, "--wait-for-stages", 60)
    wait_for(lambda: begun(folder))
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    ended = launcher.wait(pids)
    assert [one.code for one in ended] == [130] * 3, ended
    assert all("waiting" not in one.err for one in ended)
