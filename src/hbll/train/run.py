"""A run: what decides its outcome, and the folder it lives in.

configuration.json       the recipe with all its options, method, seed, and what it was run with
metrics.jsonl            one line an epoch
checkpoint.safetensors   where it stands (see `checkpoint`), and of which run
best.safetensors         the weights that were best by the validation samples, where there are any
stage-1.safetensors ..   of a run on several processes, where each stage stands, and stage-1-before.safetensors .. an epoch
                         before; then the other checkpoint has the weights of all stages, which are gathered at the end
model                    of such a run, the network as its `save` writes it, at the end
vocabulary.json          the tokens of a language model, whose checksum is in the configuration
report.html              written by `hbll report`

All but the report carry checksums. Who trains holds the folder (see `hold`).
"""

import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from hbll.data.vocabulary import Vocabulary, load_vocabulary
from hbll.files import file_sum, sealed, unsealed, write_atomically
from hbll.recipes import RECIPES, Recipe, flag
from hbll.train import checkpoint

CONFIGURATION, COMPARISON, TABLE = "configuration.json", "comparison.json", "table.json"
"""What makes a folder that of a run, of a comparison, or of a table that is made again."""

Parallel: TypeAlias = Literal["none", "stages", "data"]
"""What several processes have each: nothing, as there is one; a stage, or a replica of one; a replica of the network."""

Wire: TypeAlias = Literal["float32", "bfloat16"]
"""The precision of states on the links between stages; float32 is their own."""

_LIBRARIES = ("hbll", "torch", "numpy", "safetensors", "scikit-learn")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run; ValueError for a seed that torch cannot take, or a wire without links."""

    recipe: Recipe
    method: str
    seed: int
    folder: Path
    data_dir: Path | None = None
    parallel: Parallel = "none"
    wire: Wire = "float32"
    start_from: Path | None = None
    """The folder of the run, or of the saved network, whose weights it begins with."""

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.wire != "float32" and self.parallel != "stages":
            raise ValueError("--wire is of the links between stages: leave it out, or give --parallel stages too")

    @property
    def configuration_file(self) -> Path:
        return self.folder / CONFIGURATION

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
    def model_folder(self) -> Path:
        return self.folder / "model"

    def stage_files(self, stage: int) -> tuple[Path, Path]:
        """Where a stage of a run on several processes stands, and where it stood an epoch before."""
        return self.folder / f"stage-{stage}.safetensors", self.folder / f"stage-{stage}-before.safetensors"

    def best_stage_file(self, stage: int) -> Path:
        """Of such a run, the weights of a stage that were best by the validation samples, until they are gathered."""
        return self.folder / f"stage-{stage}-best.safetensors"

    @property
    def vocabulary_file(self) -> Path:
        return self.folder / "vocabulary.json"

    @property
    def identity(self) -> dict[str, Any]:
        """The options that make a run what it is; a depth and the number of blocks that it stands for are one."""
        options = asdict(self.recipe) | {"method": self.method, "seed": self.seed, "blocks": self.recipe.block_count}
        options |= {"parallel": self.parallel, "wire": self.wire, "start_from": self._start}
        del options["depth"]
        return options

    @property
    def _start(self) -> str | None:
        return None if self.start_from is None else str(self.start_from)

    @property
    def mark(self) -> dict[str, Any]:
        """What its checkpoint says of the run, which may go on for more epochs."""
        lasting = {option: value for option, value in self.identity.items() if option != "epochs"}
        return {"recipe": self.recipe.name, **lasting}

    def load_checkpoint(self, device: torch.device | str = "cpu", file: Path | None = None) -> dict[str, Any]:
        """Where the run, or by another file a stage of it, stands, tensors on `device`.

        ValueError for a checkpoint that is missing, damaged, or another's.
        """
        file = file or self.checkpoint_file
        state = checkpoint.load(file, device)
        with checkpoint.understood(file):
            ours = self.mark
            for option, value in state["run"].items():
                if option in ours and value != ours[option]:
                    name = "the recipe" if option == "recipe" else flag(option)
                    raise ValueError(
                        f"{file} is of another run, with {name} {_words(value)}, not {_words(ours[option])}"
                    )
        return state

    def stage_checkpoints(self, stage: int, stages: int | None = None) -> dict[int, tuple[Path, dict[str, Any]]]:
        """The checkpoints of a stage and their files, by the epochs that they have seen.

        ValueError when there is none, or one is damaged, another run's or stage's, or not of so many stages.
        """
        files = [file for file in reversed(self.stage_files(stage)) if file.exists()]
        if not files:
            raise ValueError(
                f"{self.folder} has no {self.stage_files(stage)[0].name}: give the folder in which this stage was trained"
            )
        found = {}
        for file in files:
            state = self.load_checkpoint(file=file)
            with checkpoint.understood(file):
                if state["stage"] != stage:
                    raise ValueError(f"{file} is of stage {state['stage']}, not {stage}: it is another's")
                if stages not in (None, state["stages"]):
                    raise ValueError(
                        f"{file} is of a run of {state['stages']} processes, not {stages}: start as many, or go on in one, "
                        "without a launcher"
                    )
                found[state["epoch"]] = file, state
        return found

    def write_configuration(self, device: torch.device, engine: str) -> None:
        """Writes what is run, and with what: the folder is a run's from then on."""
        configuration = {
            "recipe": self.recipe.name,
            "method": self.method,
            "seed": self.seed,
            "options": asdict(self.recipe),
            "data_dir": str(self.data_dir.absolute()) if self.data_dir else None,
            "parallel": self.parallel,
            "wire": self.wire,
            "start_from": self._start,
            "block_count": self.recipe.block_count,
            "vocabulary_sha256": file_sum(self.vocabulary_file) if self.vocabulary_file.is_file() else None,
            "device": str(device),
            "engine": engine,
            "versions": {"python": platform.python_version()} | _versions(),
        }
        write_json(self.configuration_file, configuration)


def check_seed(seed: int) -> None:
    """ValueError unless torch takes it."""
    if seed < 0:
        raise ValueError(f"--seed must be at least 0, not {seed}")
    if seed >= 2**64:
        raise ValueError(f"--seed must be less than 2^64, not {seed}")


def _words(value: Any) -> str:
    """The value of an option as it is typed."""
    return "none" if value is None else " ".join(map(str, value if isinstance(value, tuple | list) else [value]))


def _versions() -> dict[str, str]:
    """Of the libraries that are installed; hbll itself may run from its source."""
    found = {}
    for name in _LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def open_run(folder: Path) -> Run:
    """The run that lives in `folder`; ValueError when none does, or one of another version, or with other tokens."""
    stored = read_json(folder, CONFIGURATION, "run")
    with known_here(folder):
        run = Run(
            recipe=stored_recipe(stored),
            method=stored["method"],
            seed=stored["seed"],
            folder=folder,
            data_dir=Path(stored["data_dir"]) if stored["data_dir"] else None,
            parallel=stored.get("parallel", "none"),  # which older versions do not say
            wire=stored.get("wire", "float32"),
            start_from=Path(stored["start_from"]) if stored.get("start_from") else None,
        )
    file, known = run.vocabulary_file, stored.get("vocabulary_sha256")
    if known is not None and not (file.is_file() and file_sum(file) == known):
        wrong = "damaged, or another run's" if file.is_file() else "missing"
        raise ValueError(f"{file} is {wrong}: put the run's own back, whose tokens its network was trained on")
    return run


def check_free(folder: Path) -> None:
    """ValueError when a run or a comparison lies in `folder`."""
    for name, what in ((CONFIGURATION, "run"), (COMPARISON, "comparison")):
        if (folder / name).exists():
            raise ValueError(f"{folder} holds a {what} already: give --resume to go on with it, or another --run-dir")


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Writes what `read_json` reads."""
    write_atomically(file, json.dumps(sealed(content), indent=2) + "\n")


def read_json(folder: Path, name: str, what: str) -> dict[str, Any]:
    """The JSON file that makes `folder` the folder of a run or a comparison; ValueError when it does not."""
    file = folder / name
    if not file.is_file():
        raise ValueError(f"{folder} is not the folder of a {what}: it has no {name}")
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # neither JSON nor, maybe, text
        raise ValueError(f"{file} is damaged: {error}") from error
    return unsealed(stored, file)


@contextmanager
def known_here(folder: Path) -> Iterator[None]:
    """Inside, what a stored run or comparison lacks, or has of another type, is a ValueError naming the folder."""
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder} was made by another version: {error} is not known here") from error


def stored_recipe(stored: dict[str, Any]) -> Recipe:
    """The recipe that a stored run or comparison names."""
    options: dict[str, Any] = {  # JSON has lists for tuples
        option: tuple(value) if isinstance(value, list) else value for option, value in stored["options"].items()
    }
    return RECIPES[stored["recipe"]](**options)


def check_same(stored: Run, wanted: Run) -> None:
    """ValueError naming the first option in which `wanted` would not go on as `stored` began.

    More epochs are no difference as long as the learning rate does not depend on their number.
    """
    if wanted.recipe.name != stored.recipe.name:
        raise ValueError(f"{stored.folder} holds a run of {stored.recipe.name}, not of {wanted.recipe.name}")
    longer = wanted.recipe.schedule == "constant" and wanted.recipe.epochs > stored.recipe.epochs
    before = stored.identity
    for option, value in wanted.identity.items():
        if value != before[option] and not (option == "epochs" and longer):
            raise ValueError(
                f"{stored.folder} was trained with {flag(option)} {_words(before[option])}, not {_words(value)}: "
                "a run is resumed as it was begun; start another with another --run-dir"
            )


def check_vocabulary(run: Run, vocabulary: Vocabulary | None) -> None:
    """ValueError if a run's network was trained on other tokens than these, those of the data at hand."""
    if vocabulary is not None and vocabulary != load_vocabulary(run.vocabulary_file):
        raise ValueError(
            f"the tokens of the data are not those of {run.vocabulary_file}, which its network was trained on: name the "
            "folder with the same data by --data-dir"
        )


def check_folder(run: Run, resume: bool) -> None:
    """ValueError unless the folder holds the run to go on with, or is free for a new one."""
    if resume:
        check_same(open_run(run.folder), run)
    else:
        check_free(run.folder)
