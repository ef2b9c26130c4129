"""Workers that wait for a lost one. Oracle: a run that nothing disturbs."""

import os
import signal
import socket
import time
from pathlib import Path

import pytest
from tests.training import free_port

from hbll.train import checkpoint, metrics
from hbll.train import waiting as anew
from hbll.train.run import CONFIGURATION, open_run
from hbll.train.waiting import TOLD, TORCHRUN, LostError, waiting

RUN = ["train", "digits", "--blocks", 4, "--width", 16, "--stage", 1, 1, 2, "--train-samples", 300, "--epochs", 60]
RUN += ["--schedule", "cosine", "--rule", "stream", "--refresh", 3, "--parallel", "stages"]


LONG = ["--epochs", 5000]
"""Of runs that do not come to their end."""


def wait_for(reached):
    deadline = time.monotonic() + 120
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
    whole, folders, port = tmp_path / "whole", [tmp_path / name for name in ("first", "second", "third")], free_port()
    assert [one.code for one in launcher.run(3, *RUN, "--run-dir", whole)] == [0] * 3
    options = [*RUN, "--wait-for-stages", 60]
    first, second, third = launcher.start(3, *options, folders=folders, port=port)
    wait_for(lambda: begun(folders[0]))
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: all("waiting" in launcher.files[pid][1].read_text() for pid in (second, third)))
    os.kill(third, signal.SIGKILL)  # which waits
    again = launcher.start(3, *options, "--resume", ranks=[0, 2], folders=folders, port=port)
    ended = launcher.wait([second, *again], seconds=120)
    assert [one.code for one in ended] == [0] * 3, ended
    (told,) = ended[0].err.splitlines()
    assert told.startswith("hbll: stage 2: ")
    assert f"its checkpoint {folders[1]}/stage-2.safetensors has seen " in told
    assert told.endswith(
        "epochs; waiting up to 60 seconds for what is lost: start it again by the same command, with "
        f"--run-dir {folders[1]} --resume"
    )
    (weights, lines), (expected, undisturbed) = outcome(folders[0]), outcome(whole)
    assert weights.keys() == expected.keys()
    assert all(weights[name].equal(expected[name]) for name in expected)
    assert lines == undisturbed


def test_what_does_not_come_back_is_waited_for_no_longer_than_was_said(launcher, tmp_path):
    folder = tmp_path / "run"
    pids = launcher.start(3, *RUN, *LONG, "--run-dir", folder, "--wait-for-stages", 1)
    wait_for(lambda: begun(folder))
    os.kill(pids[1], signal.SIGKILL)
    for n, one in zip((1, 3), launcher.wait([pids[0], pids[2]], seconds=120), strict=True):
        *_, waits, ends = one.err.splitlines()
        assert one.code == 2
        assert "; waiting up to 1 seconds" in waits
        assert ends.startswith(f"hbll: stage {n}: ")
        assert ends.split("; ")[0] == waits.split("; ")[0]
        assert f"its checkpoint {folder}/stage-{n}.safetensors has seen " in ends
        assert ends.endswith(f": start all processes again with --run-dir {folder} --resume")


def test_what_waits_is_ended_by_sigterm(launcher, tmp_path):
    folder = tmp_path / "run"
    pids = launcher.start(3, *RUN, *LONG, "--run-dir", folder, "--wait-for-stages", 60)
    wait_for(lambda: begun(folder))
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    ended = launcher.wait(pids)
    assert [one.code for one in ended] == [130] * 3, ended
    assert all("waiting" not in one.err for one in ended)


LOST = LostError("stage 1: stage 2 ended", ": start all", Path("run"), False)
TOLD_BEFORE = "stage 1: stage 3 ended: start all"


@pytest.mark.parametrize(
    ("error", "before", "resume", "count", "sentence"),
    [
        (LOST, None, False, 1, str(LOST)),
        (LOST, f"1 {TOLD_BEFORE}", True, 2, str(LOST)),
        (ConnectionError("another process ended"), f"2 {TOLD_BEFORE}", True, 3, TOLD_BEFORE),
        (
            LostError("stage 1: stage 2 ended", "", Path("run"), True),
            f"3 {TOLD_BEFORE}",
            True,
            1,
            "stage 1: stage 2 ended",
        ),
    ],
)
def test_a_process_that_loses_another_one_begins_anew(tmp_path, monkeypatch, error, before, resume, count, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / CONFIGURATION).touch()
    monkeypatch.setenv(TOLD, before) if before else monkeypatch.delenv(TOLD, raising=False)
    begun = []
    monkeypatch.setattr(anew, "_begin_anew", begun.append)
    with waiting(5, Path("run") if resume else None, resume):
        raise error
    assert begun == [[] if resume else ["--run-dir", "run", "--resume"]]
    assert os.environ[TOLD] == f"{count} {sentence}"


@pytest.mark.parametrize(
    ("error", "times", "files", "resume"),
    [
        (LOST, 0, [], False),  # before the first checkpoint
        (LOST, 3, [CONFIGURATION], True),  # too often within an epoch
        (ConnectionError("another process ended"), 0, [CONFIGURATION], False),  # beside another run
        (BrokenPipeError(), 0, [CONFIGURATION], True),  # the reader of its output
    ],
)
def test_what_waiting_does_not_help_with_ends_the_process(tmp_path, monkeypatch, error, times, files, resume):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    for name in files:
        (tmp_path / "run" / name).touch()
    monkeypatch.setenv(TOLD, f"{times} {TOLD_BEFORE}")
    with pytest.raises(type(error)), waiting(5, Path("run"), resume):
        raise error


@pytest.mark.parametrize(
    ("error", "kind", "sentence"),
    [
        (TimeoutError("nobody came"), ValueError, TOLD_BEFORE),
        (KeyboardInterrupt(), KeyboardInterrupt, TOLD_BEFORE),
        (KeyboardInterrupt("stage 1: stopped"), KeyboardInterrupt, "stage 1: stopped"),
    ],
)
def test_who_waits_in_vain_says_from_where_to_go_on(monkeypatch, error, kind, sentence):
    monkeypatch.setenv(TOLD, f"1 {TOLD_BEFORE}")
    with pytest.raises(kind) as told, waiting(5, Path("run"), True):
        raise error
    assert str(told.value) == sentence


SECONDS = "hbll: --wait-for-stages must be at least 1 and below 10^9 seconds, not 0.5\n"
ALONE = "hbll: --wait-for-stages is of several processes: leave it out, or give --parallel stages or data\n"
ENDS_ALL = (
    "hbll: torchrun ends all processes when it loses one, and none can wait: leave --wait-for-stages out, or start them "
    "one by one\n"
)


@pytest.mark.parametrize(
    ("arguments", "environment", "sentence"),
    [
        ([*RUN, "--wait-for-stages", 0.5], {}, SECONDS),
        (["train", "digits", "--rule", "bp", "--wait-for-stages", 5], {}, ALONE),
        ([*RUN, "--wait-for-stages", 5], {TORCHRUN: "none"}, ENDS_ALL),
    ],
)
def test_waiting_is_for_processes_that_were_started_one_by_one(launcher, arguments, environment, sentence):
    (ended,) = launcher.run(2, *arguments, ranks=[1], **environment)
    assert (ended.code, ended.err) == (2, sentence)


def test_what_never_comes_is_told_and_a_port_in_use(launcher):
    for rank, reason in ((0, "without rank 1, 2"), (1, "[Errno 111] Connection refused")):
        port = free_port()
        (ended,) = launcher.run(3, *RUN, "--wait-for-stages", 1, ranks=[rank], port=port)
        assert (ended.code, ended.err) == (
            2,
            f"hbll: process {rank} of 3 did not meet the others at 127.0.0.1:{port} within 1 seconds: start all of them, "
            f"with the same address and port ({reason})\n",
        )
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        (ended,) = launcher.run(3, *RUN, "--wait-for-stages", 5, ranks=[0], port=port)
    assert (ended.code, ended.err) == (
        2,
        f"hbll: another program listens at 127.0.0.1:{port}, where the processes were to meet: give another MASTER_PORT\n",
    )
