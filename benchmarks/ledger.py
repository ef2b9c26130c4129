"""Results as lines of JSON in a file, which an interrupted benchmark goes on from, and how they are shown."""

import json
import math
import shutil
import statistics
import subprocess
from pathlib import Path


def commit() -> str:
    """The commit at hand; empty where there is no git."""
    if shutil.which("git") is None:
        return ""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()


def read(file: Path) -> list[dict]:
    """All lines so far, none if there is no file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def find(lines: list[dict], job: dict) -> dict | None:
    """The first line that has all that a job has."""
    return next((line for line in lines if all(line.get(key) == value for key, value in job.items())), None)


def append(file: Path, line: dict) -> None:
    """Adds one line; the folder is made if need be."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lines:
        lines.write(json.dumps(line) + "\n")


def mean_and_spread(values: list[float]) -> str:
    """The mean, and the standard deviation if there are several values; `diverged` if one is not finite."""
    if not all(map(math.isfinite, values)):
        return "diverged"
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"
