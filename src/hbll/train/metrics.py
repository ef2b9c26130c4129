"""Metrics of a run as JSON lines, one an epoch."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hbll.train.evaluate import PathResult
from hbll.train.files import write_atomically


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """What an epoch came to."""

    epoch: int
    """Epochs done, from 1."""

    loss: float
    """Mean over the epoch's steps of what the method minimises: comparable within a method only."""

    learning_rate: float
    """Of the epoch's last step."""

    paths: list[PathResult]
    """The test samples measured at the end of the epoch along the usual paths, the chain first."""

    seconds: float
    """Wall-clock time of the epoch's training steps, without evaluation and diagnosis."""

    work: float
    span: float
    """Of a step, means over the epoch, in block evaluations (the units of `hbll.rule.Step`)."""

    defect: float | None
    """Mean over the epoch of how far the last sweep still moved the states, relative to their norm; None of rules without
    sweeps."""

    validation: PathResult | None = None
    """The chain on the validation samples at the end of the epoch, where there are any."""

    nodes: dict[str, dict[str, float | None]]
    """Each stage's report on one batch at the end of the epoch (see `hbll.rule.Report`); None where undefined, and
    no stage at all for a rule that cannot be diagnosed."""

    @property
    def chain(self) -> PathResult:
        """What the chain came to."""
        return self.paths[0]


def append(file: Path, metrics: Metrics) -> None:
    """Adds a line."""
    lines = file.read_text() if file.exists() else ""
    write_atomically(file, lines + json.dumps(_finite(asdict(metrics)), allow_nan=False) + "\n")


def read(file: Path) -> list[Metrics]:
    """All lines, in order; none for a missing file. ValueError for damaged lines, or lines of another version."""
    if not file.exists():
        return []
    try:
        return [Metrics(**json.loads(line)) for line in file.read_text().splitlines()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    except TypeError as error:
        raise ValueError(f"{file} was made by another version: {error}") from error


def cut(file: Path, epochs: int) -> None:
    """Drops the lines after that many epochs: a process killed after its line may not have saved its checkpoint.

    ValueError for a file with fewer or damaged lines.
    """
    if len(read(file)) < epochs:
        raise ValueError(f"{file} is damaged: it has fewer lines than the {epochs} epochs that the checkpoint has seen")
    if file.exists():
        write_atomically(file, "".join(file.read_text().splitlines(keepends=True)[:epochs]))


def _finite(part: Any) -> Any:
    """JSON has no NaN and no infinity: None stands for both."""
    if isinstance(part, dict):
        return {key: _finite(value) for key, value in part.items()}
    return None if isinstance(part, float) and not math.isfinite(part) else part
