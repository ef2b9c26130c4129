"""A run: what decides its outcome, and the folder it lives in.

configuration.json       the recipe with all its options, method, seed, and what it was run with
metrics.jsonl            one line an epoch
checkpoint.safetensors   where it stands (see `checkpoint`)
best.safetensors         the weights that were best by the validation samples, where there are any
vocabulary.json          the tokens of a language model
report.html              written by `hbll report`
"""

import json
import platform
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from hbll.recipes import RECIPES, Recipe, flag
from hbll.train.files import write_atomically

_LIBRARIES = ("hbll", "torch", "numpy", "safetensors", "scikit-learn")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run; ValueError for a negative seed."""

    recipe: Recipe
    method: str
    seed: int
    folder: Path
    data_dir: Path | None = None

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"--seed must be at least 0, not {self.seed}")

    @property
    def configuration_file(self) -> Path:
        return self.folder / "configuration.json"

    @property
    def metrics_file(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def checkpoint_file(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    @property
    def best_file(self) -> Path:
        return self.folder / "best.safetensors"

    @property
    def vocabulary_file(self) -> Path:
        return self.folder / "vocabulary.json"

    def claim(self) -> None:
        """Makes the folder; ValueError when it holds a run already."""
        if (self.folder / "comparison.json").exists():
            raise ValueError(f"{self.folder} holds a comparison: give the run another --run-dir")
        if self.configuration_file.exists():
            raise ValueError(f"{self.folder} holds a run already: give --resume to go on with it, or another --run-dir")
        self.folder.mkdir(parents=True, exist_ok=True)

    def write_configuration(self, device: torch.device, engine: str) -> None:
        """Writes what is run, and with what: the folder is a run's from then on."""
        configuration = {
            "recipe": self.recipe.name,
            "method": self.method,
            "seed": self.seed,
            "options": asdict(self.recipe),
            "data_dir": str(self.data_dir.absolute()) if self.data_dir else None,
            "block_count": self.recipe.block_count,
            "device": str(device),
            "engine": engine,
            "versions": {"python": platform.python_version()} | _versions(),
        }
        write_atomically(self.configuration_file, json.dumps(configuration, indent=2) + "\n")


def _versions() -> dict[str, str]:
    """Of the libraries that are installed; hbll itself may run from its source."""
    found = {}
    for name in _LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def open_run(folder: Path) -> Run:
    """The run that lives in `folder`; ValueError when none does."""
    configuration = read_json(folder, "configuration.json", "run")
    recipe = stored_recipe(configuration, folder)
    data_dir = configuration["data_dir"]
    return Run(
        recipe=recipe,
        method=configuration["method"],
        seed=configuration["seed"],
        folder=folder,
        data_dir=Path(data_dir) if data_dir else None,
    )


def read_json(folder: Path, name: str, what: str) -> dict[str, Any]:
    """The JSON file that makes `folder` the folder of a run or a comparison; ValueError when it does not."""
    file = folder / name
    if not file.is_file():
        raise ValueError(f"{folder} is not the folder of a {what}: it has no {name}")
    try:
        stored = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(stored, dict) or "recipe" not in stored:
        raise ValueError(f"{file} is damaged: it names no recipe")
    return stored


def stored_recipe(stored: dict[str, Any], folder: Path) -> Recipe:
    """The recipe that a stored run or comparison names; ValueError when this version has none like it."""
    try:
        options: dict[str, Any] = {  # JSON has lists for tuples
            option: tuple(value) if isinstance(value, list) else value for option, value in stored["options"].items()
        }
        return RECIPES[stored["recipe"]](**options)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder} was made by another version: {error} is not known here") from error


def check_same(stored: Run, wanted: Run) -> None:
    """ValueError naming the first option in which `wanted` would not go on as `stored` began.

    More epochs are no difference as long as the learning rate does not depend on their number.
    """
    if wanted.recipe.name != stored.recipe.name:
        raise ValueError(f"{stored.folder} holds a run of {stored.recipe.name}, not of {wanted.recipe.name}")
    longer = wanted.recipe.schedule == "constant" and wanted.recipe.epochs > stored.recipe.epochs
    before, now = _identity(stored), _identity(wanted)
    for option, value in now.items():
        if value != before[option] and not (option == "epochs" and longer):
            raise ValueError(
                f"{stored.folder} was trained with {flag(option)} {before[option]}, not {value}: "
                "a run is resumed as it was begun; start another with another --run-dir"
            )


def _identity(run: Run) -> dict[str, Any]:
    """The options that make a run what it is; a depth and the number of blocks that it stands for are one."""
    options = asdict(run.recipe) | {"method": run.method, "seed": run.seed, "blocks": run.recipe.block_count}
    return {option: value for option, value in options.items() if option != "depth"}
