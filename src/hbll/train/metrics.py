"""Metrics of a run as JSON lines, one an epoch, each with a checksum."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hbll.files import sealed, unsealed, write_atomically
from hbll.train.evaluate import PathResult


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
    line = json.dumps(sealed(_finite(asdict(metrics))), allow_nan=False)
    write_atomically(file, _content(file) + line.encode() + b"\n")


def read(file: Path) -> list[Metrics]:
    """All lines, in order; none for a missing file. ValueError for damaged lines, or lines of another version."""
    try:
        stored = [json.loads(line) for line in _content(file).splitlines()]
    except ValueError as error:  # neither JSON nor, maybe, text
        raise ValueError(f"{file} is damaged: {error}") from error
    try:
        return [Metrics(**unsealed(line, file)) for line in stored]
    except TypeError as error:
        raise ValueError(f"{file} was made by another version: {error}") from error


def digest(file: Path) -> str:
    """By which `cut` knows the lines that are there now."""
    return _digest(_content(file))


def cut(file: Path, epochs: int, kept: str) -> None:
    """Drops the lines after that many epochs: a process killed after its line may not have saved its checkpoint.

    ValueError, and nothing dropped, unless what stays has the digest `kept`.
    """
    if len(read(file)) < epochs:
        raise ValueError(f"{file} is damaged: it has fewer lines than the {epochs} epochs that the checkpoint has seen")
    lines = _content(file).splitlines(keepends=True)
    first = b"".join(lines[:epochs])
    if _digest(first) != kept:
        raise ValueError(f"{file} is damaged, or of another run: its lines are not those that the checkpoint has seen")
    if len(lines) > epochs:
        write_atomically(file, first)


def _content(file: Path) -> bytes:
    return file.read_bytes() if file.exists() else b""


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _finite(part: Any) -> Any:
    """JSON has no NaN and no infinity: None stands for both."""
    if isinstance(part, dict):
        return {key: _finite(value) for key, value in part.items()}
    return None if isinstance(part, float) and not math.isfinite(part) else part
