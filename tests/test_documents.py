"""The code that README, docs and examples show runs as it stands."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def code(document):
    """The Python blocks of a page, in order."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(), re.DOTALL | re.MULTILINE)


def test_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    tokens = torch.randint(100, (4, 4, 9))
    names = {"batches": [(sequences[:, :-1], sequences[:, 1:]) for sequences in tokens]}
    blocks = code("README.md")
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "model" / "weights.safetensors").is_file()
    assert names["logits"].shape == (4, 8, 100)


def test_a_rule_of_ones_own(capsys):
    (block,) = [block for block in code("docs/method.md") if "hbll.Rule" in block]
    exec(compile(block, "docs/method.md", "exec"), {})
    assert capsys.readouterr().err == ""


def test_inference():
    torch.manual_seed(0)
    (block,) = code("docs/inference.md")
    names: dict = {}
    exec(compile(block, "docs/inference.md", "exec"), names)
    assert names["text"].tokens.equal(names["plain"].tokens)
    assert names["exited"].logits.shape == (64, 3)


@pytest.mark.parametrize("rule", ["stream", "paper"])
def test_example(rule, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["own_network.py", rule])
    threads = torch.get_num_threads()
    try:
        runpy.run_path(str(ROOT / "examples" / "own_network.py"), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    shares = [float(share) for share in re.findall(r"([\d.]+)%", capsys.readouterr().out)]
    assert shares
    assert shares[-1] > 50  # ten classes
