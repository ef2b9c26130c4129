"""The programs in examples run as they stand, and learn."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
TEN_CLASSES = 50
"""Percent that ten classes are not met at by chance."""


@pytest.fixture
def output(monkeypatch, tmp_path, capsys):
    """Runs a program in a folder of its own; what it prints."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    yield run
    torch.set_num_threads(threads)


def shares(text):
    """The percentages in a text."""
    return [float(share) for share in re.findall(r"([\d.]+)%", text)]


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda example: example.stem)
def test_an_example_is_short(example):
    assert len(example.read_text().splitlines()) < 60


@pytest.mark.parametrize("rule", ["stream", "paper"])
def test_own_network(output, rule):
    assert shares(output("own_network.py", rule))[-1] > TEN_CLASSES


def test_writing_a_rule(output):
    printed = output("writing_a_rule.py")
    assert "block 3, block 4, auxiliary 2" in printed  # of the audit
    assert shares(printed)[-1] > TEN_CLASSES


def test_anytime_inference(output):
    printed = output("anytime_inference.py")
    # The tree of 15 blocks has a rim of four: a path of each length, and the chain.
    assert re.findall(r"^ *(\d+) of 15 blocks", printed, re.MULTILINE) == ["1", "2", "3", "4", "15"]
    assert min(shares(printed)) > TEN_CLASSES
    affine = 64 * 64 + 64
    of_ten = 64 * 10 + 10
    assert printed.endswith(f"{5 * affine + of_ten} of {16 * affine + of_ten} parameters\n")


def test_two_processes(tmp_path):
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, EXAMPLES / "two_processes.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result, first, second = sorted(done.stdout.splitlines())
    block, head = 64 * 64 + 64, 64 * 10 + 10  # the embed is as large as a block
    # The first of two stages has copies of the last block and the head, through which its credit comes.
    assert first.startswith(f"stage 1: {block + 3 * block + block + head} parameters")
    assert second == f"stage 2: {4 * block + head} parameters, 0 bytes sent"
    assert shares(result)[0] > TEN_CLASSES


@pytest.mark.filterwarnings("ignore")  # theirs
def test_lightning_module(output):
    pytest.importorskip("lightning", reason="lightning is not installed")
    assert shares(output("lightning_module.py"))[-1] > TEN_CLASSES


@pytest.mark.filterwarnings("ignore")  # theirs
def test_hugging_face(output):
    pytest.importorskip("transformers", reason="the extra hf is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    tokens = [int(token) for token in output("hugging_face.py").splitlines()[-1].split()]
    assert tokens == [(3 + 5 * k) % 12 for k in range(9)]
