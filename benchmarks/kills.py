"""Kills at random moments: whether runs on several processes end or wait, and go on as if nothing had been.

    python benchmarks/kills.py [--kills 30] [--cuts 3,4 2,2,3]

For each cut of a chain of 7 blocks on the embedded digits an undisturbed run is made, a stage a process. Then runs are begun
alike, and one of their processes, drawn by chance, is killed (SIGKILL). Of five kills one comes in the time that the
undisturbed run took until its first epoch was done; the others in an epoch, and at a moment of it, that are drawn from all
alike. Runs go on in two ways: either the other processes have to end by themselves, and all are started again, or they wait
(--wait-for-stages) and the killed one alone is started again, after a pause of up to 5 seconds. Then the run has to come to
the undisturbed one's weights, bit by bit, and to its metrics. Exit status 1 if one does not. Runs are those of the command
line, which needs its extra: pip install "hbll[cli]".
"""

import argparse
import importlib
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hbll import cli

TIMEOUT = 30
"""Seconds for which stages wait for each other."""

PATIENCE = 3 * TIMEOUT
"""Seconds after a kill by which all have to have ended, those that were still to meet included; or for which they wait."""

LIMIT = 600
"""Seconds after which a run that has not ended hangs."""

WAYS = ("early", "together", "alone", "together", "alone")
"""In turn: killed at the start; or in training, after which all are started again or the killed one alone."""


class Undisturbed(NamedTuple):
    """The run that others are to come to."""

    options: list[Any]
    """Of its command."""
    sizes: list[int]
    """Blocks of its stages."""
    epochs: int
    start_seconds: float
    """Until its first epoch is done."""
    epoch_seconds: float
    outcome: tuple[bytes, list[dict]]


class Process:
    """A process of the command line, forked, as imports take longer than what is killed here.

    Args:
        arguments: of the command.
        environment: further variables.
        file: what it writes goes there.
    """

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], file: Path) -> None:
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            os.environ.update(environment)
            sys.orig_argv = [sys.executable, "-m", "hbll", *arguments]  # with which it may begin anew
            said = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(said, 1)
            os.dup2(said, 2)
            cli.main(arguments)
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            os._exit(code)

    def poll(self) -> int | None:
        """Its exit code, once it has ended."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def kill(self) -> None:
        """Ends it, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            while self.poll() is None:
                time.sleep(0.001)


def start(folder: Path, world: int, ranks: Sequence[int], port: int, *options: Any) -> list[Process]:
    """Some processes of a run, a stage each, and what they write in files beside its folder."""
    told = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    arguments = [str(word) for word in ("train", "digits", "--run-dir", folder, "--timeout", TIMEOUT, *options)]
    processes = []
    for rank in ranks:
        environment = {name: str(value) for name, value in (told | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        processes.append(Process(arguments, environment, Path(f"{folder}-{rank}.txt")))
    return processes


def ended(processes: Sequence[Process], seconds: float) -> list[int | None]:
    """Their exit codes; None, and a kill, for one that hangs."""
    until = time.monotonic() + seconds
    while any(process.poll() is None for process in processes) and time.monotonic() < until:
        time.sleep(0.01)
    codes = [process.poll() for process in processes]
    for process in processes:
        process.kill()
    return codes


def free_port(draw: random.Random) -> int:
    """Below those that are given to connections, one of which might have it when a process comes again."""
    return draw.randrange(20_000, 30_000)


def epochs_done(folder: Path) -> int:
    lines = folder / "metrics.jsonl"
    return lines.read_bytes().count(b"\n") if lines.exists() else 0


def wait_for_epoch(folder: Path, epoch: int, processes: Sequence[Process]) -> float:
    """The moment when a run has done an epoch, or one of its processes has ended."""
    while epochs_done(folder) < epoch and all(process.poll() is None for process in processes):
        time.sleep(0.002)
    return time.monotonic()


def outcome(folder: Path) -> tuple[bytes, list[dict]]:
    """The model's weights, and the metrics but for the time they took."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in line.items() if key not in ("seconds", "sha256")} for line in lines]
    return (folder / "model" / "weights.safetensors").read_bytes(), kept


def undisturbed(folder: Path, sizes: list[int], epochs: int, port: int) -> Undisturbed:
    options = ["--rule", "stream", "--refresh", 5, "--width", 32, "--stage", *sizes, "--epochs", epochs]
    options += ["--schedule", "cosine", "--parallel", "stages"]
    began = time.monotonic()
    processes = start(folder, len(sizes), range(len(sizes)), port, *options)
    first, last = (wait_for_epoch(folder, epoch, processes) for epoch in (1, epochs))
    codes = ended(processes, LIMIT)
    if any(code != 0 for code in codes):
        raise SystemExit(f"the undisturbed run ended with {codes}")
    return Undisturbed(options, sizes, epochs, first - began, (last - first) / (epochs - 1), outcome(folder))


def disturbed(whole: Undisturbed, folder: Path, way: str, draw: random.Random) -> tuple[str, bool, bool]:
    """Kills a process of a run and takes the run up again.

    Returns:
        What happened, whether a process was killed at all, and whether all of them ended as they should.
    """
    world, port = len(whole.sizes), free_port(draw)
    options = [*whole.options, *(["--wait-for-stages", PATIENCE] if way == "alone" else [])]
    processes = start(folder, world, range(world), port, *options)
    victim = draw.randrange(world)
    if way == "early":
        time.sleep(draw.uniform(0, whole.start_seconds))
    else:
        wait_for_epoch(folder, draw.randrange(1, whole.epochs), processes)
        time.sleep(draw.uniform(0, whole.epoch_seconds))
    hit = processes[victim].poll() is None
    processes[victim].kill()
    said = f"stage {victim + 1} after {epochs_done(folder)} of {whole.epochs} epochs"
    if way == "alone":
        time.sleep(draw.uniform(0, 5))
        (processes[victim],) = start(folder, world, [victim], port, *options, "--resume")
        codes = ended(processes, LIMIT)
        if all(code == 0 for code in codes):
            return f"{said}, started again alone", hit, True
        said = f"{said}, started again alone: exit codes {codes}"
        others = [code for rank, code in enumerate(codes) if rank != victim]
        if None in codes or 0 not in others:  # of which one that has come to its end cannot wait
            return said, hit, False
    else:
        codes = ended(processes, PATIENCE)
        said = f"{said}: exit codes {codes}"
        if hit and any(code not in (0, 2) for rank, code in enumerate(codes) if rank != victim):
            return said, hit, False
    again = ["--resume"] if (folder / "configuration.json").exists() else []
    codes = ended(start(folder, world, range(world), free_port(draw), *whole.options, *again), LIMIT)
    return f"{said}, all started again", hit, all(code == 0 for code in codes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="of all cuts together")
    parser.add_argument("--cuts", nargs="+", default=["3,4", "2,2,3"], help="blocks of the stages")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    for module in ("hbll.train.console", "hbll.train.parallel", "torch._dynamo"):  # all that takes time to load
        importlib.import_module(module)
    draw = random.Random(options.seed)
    wrong = 0
    with tempfile.TemporaryDirectory() as place:
        for index, cut in enumerate(options.cuts):
            sizes = [int(size) for size in cut.split(",")]
            whole = undisturbed(Path(place) / f"whole-{index}", sizes, options.epochs, free_port(draw))
            for kill in range(options.kills // len(options.cuts) + (index < options.kills % len(options.cuts))):
                way = WAYS[kill % len(WAYS)]
                for attempt in itertools.count():
                    folder = Path(place) / f"killed-{index}-{kill}-{attempt}"
                    said, hit, right = disturbed(whole, folder, way, draw)
                    if hit:  # else it had come to its end before
                        break
                right = right and outcome(folder) == whole.outcome
                wrong += not right
                print(f"{sizes}, kill {kill + 1}, {way}: {said}: {'equal' if right else 'WRONG'}", flush=True)
    print(f"{options.kills} kills, {wrong} not as they should be")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
