"""The code that README and the documentation show runs as it stands; what they name is there."""

import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import hbll

ROOT = Path(__file__).parents[1]
CHECKED = ("README.md", "docs/inference.md")
"""Pages of whose code more is asked than that it runs."""
OPTIONAL = {"accelerate", "lightning", "numba", "sklearn", "transformers"}
PAGES = ("README.md", *(str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs").rglob("*.md"))))


def blocks(page):
    """The Python blocks of a page in order, each on its own lines of it."""
    text = (ROOT / page).read_text()
    for block in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        yield "\n" * text.count("\n", 0, block.start(1)) + block[1]


def run(page):
    """Runs the blocks of a page one after the other; the names that they made."""
    names = {"__name__": "page"}
    for block in blocks(page):
        try:
            exec(compile(block, ROOT / page, "exec"), names)
        except ModuleNotFoundError as missing:
            if missing.name in OPTIONAL:
                pytest.skip(f"{missing.name} is not installed")
            raise
    return names


@pytest.fixture(autouse=True)
def beside_the_examples(tmp_path, monkeypatch):
    """Where a reader would be who tries what a page shows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples")
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("page", [page for page in PAGES if page not in CHECKED and any(blocks(page))])
def test_the_code_of_a_page_runs(page):
    run(page)


def test_the_code_of_the_readme_trains_a_network():
    names = run("README.md")
    right = (names["network"](names["x"]).argmax(1) == names["y"]).float().mean()
    assert right > 0.5  # of eight classes


def test_the_code_of_the_page_on_inference():
    names = run("docs/inference.md")
    assert names["text"].tokens.equal(names["plain"].tokens)
    assert names["exited"].logits.shape == (64, 3)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_what_a_page_beside_the_code_names_is_there(page):
    text = (ROOT / page).read_text()
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert all(link.startswith("https://") for link in links)  # others lead nowhere on a package index
    named = re.findall(r"`((?:benchmarks|docs|examples|src|tests)/[\w./-]+|[A-Z]+\.(?:md|cff))`", text)
    assert named
    assert [name for name in named if not (ROOT / name).exists() and name != "docs/_build"] == []


def test_the_api_page_has_every_package():
    packages = ["hbll", *(found.name for found in pkgutil.walk_packages(hbll.__path__, "hbll.") if found.ispkg)]
    public = [name for name in packages if hasattr(importlib.import_module(name), "__all__")]
    documented = re.findall(r"^\.\. automodule:: (\S+)", (ROOT / "docs" / "api.rst").read_text(), re.MULTILINE)
    assert set(public) <= set(documented)
