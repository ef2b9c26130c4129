"""Kills at random moments: whether runs on several processes end, and go on as if nothing had been.

    python benchmarks/kills.py [--kills 30] [--cuts 3,4 2,2,3]

For each cut of a chain of 7 blocks on the embedded digits an undisturbed run is made, a stage a process. Then runs are begun
alike, and one of their processes, drawn by chance, is killed (SIGKILL) at a moment drawn from the time that the undisturbed
one took, from the start of its processes to their end. The others have to end by themselves, and the run, taken up again,
has to come to the undisturbed one's weights, bit by bit, and to its metrics. Exit status 1 if one does not. Runs are those
of the command line, which needs its extra: pip install "hbll[cli]".
"""

import argparse
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

TIMEOUT = 30
"""Seconds for which stages wait for each other."""

PATIENCE = 2 * TIMEOUT
"""Seconds after a kill by which all have to have ended."""


def start(sizes: Sequence[int], folder: Path, epochs: int, resume: bool) -> list[subprocess.Popen]:
    """The processes of a run, a stage each, and what they write in files beside its folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"WORLD_SIZE": str(len(sizes)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "hbll", "train", "digits", "--run-dir", folder, "--timeout", TIMEOUT]
    begun = ["--rule", "stream", "--refresh", 5, "--width", 32, "--stage", *sizes, "--epochs", epochs]
    command += ["--resume"] if resume else [*begun, "--schedule", "cosine", "--parallel", "stages"]
    processes = []
    for rank in range(len(sizes)):
        with open(f"{folder}-{rank}.txt", "w") as said:
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(len(sizes))}
            words = [str(word) for word in command]
            processes.append(subprocess.Popen(words, env=os.environ | told | own, stdout=said, stderr=said))
    return processes


def ended(processes: Sequence[subprocess.Popen], seconds: float) -> list[int | None]:
    """Their exit codes; None, and a kill, for one that hangs."""
    codes: list[int | None] = []
    until = time.monotonic() + seconds
    for process in processes:
        try:
            codes.append(process.wait(max(0, until - time.monotonic())))
        except subprocess.TimeoutExpired:
            codes.append(None)
            process.kill()
            process.wait()
    return codes


def outcome(folder: Path) -> tuple[bytes, list[dict]]:
    """The model's weights, and the metrics but for the time they took."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in line.items() if key not in ("seconds", "sha256")} for line in lines]
    return (folder / "model" / "weights.safetensors").read_bytes(), kept


def disturbed(sizes: Sequence[int], folder: Path, epochs: int, took: float, draw: random.Random) -> tuple[str, bool]:
    """Kills a process of a run and takes the run up again; what happened, and whether a process was killed at all."""
    processes = start(sizes, folder, epochs, resume=False)
    victim, moment = draw.randrange(len(sizes)), draw.uniform(0, took)
    time.sleep(moment)
    hit = processes[victim].poll() is None
    processes[victim].send_signal(signal.SIGKILL)
    codes = ended(processes, PATIENCE)
    lines = folder / "metrics.jsonl"
    seen = lines.read_bytes().count(b"\n") if lines.exists() else 0
    said = f"stage {victim + 1} at {moment:.2f} s, after {seen} epochs: exit codes {codes}"
    others = [code for rank, code in enumerate(codes) if rank != victim]
    if hit and any(code not in (0, 2) for code in others):
        return f"{said}, which should be 2", hit
    resumed = ended(start(sizes, folder, epochs, resume=(folder / "configuration.json").exists()), 10 * PATIENCE)
    return (f"{said}; taken up again: {resumed}" if any(resumed) or None in resumed else said), hit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="of all cuts together")
    parser.add_argument("--cuts", nargs="+", default=["3,4", "2,2,3"], help="blocks of the stages")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    cuts = [[int(size) for size in cut.split(",")] for cut in options.cuts]
    wrong = 0
    with tempfile.TemporaryDirectory() as place:
        for index, sizes in enumerate(cuts):
            whole = Path(place) / f"whole-{index}"
            began = time.monotonic()
            codes = ended(start(sizes, whole, options.epochs, resume=False), 10 * PATIENCE)
            took = time.monotonic() - began
            if any(codes) or None in codes:
                raise SystemExit(f"the undisturbed run ended with {codes}")
            kills = 0
            for attempt in itertools.count():
                if kills == options.kills // len(cuts) + (index < options.kills % len(cuts)):
                    break
                folder = Path(place) / f"killed-{index}-{attempt}"
                said, hit = disturbed(sizes, folder, options.epochs, took, draw)
                if not hit:
                    continue  # it had come to its end before
                kills += 1
                right = (folder / "model").exists() and outcome(folder) == outcome(whole)
                wrong += not right
                print(f"{sizes}, kill {kills}: {said}: {'equal' if right else 'NOT EQUAL'}", flush=True)
    print(f"{options.kills} kills, {wrong} not as they should be")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
