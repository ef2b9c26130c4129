"""Processes of the command line that train together, as a launcher starts them; forked, since imports take seconds."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]

SERVER = """
import json, os, sys, time
import torch._dynamo, hbll.train.parallel, hbll.train.console  # all that takes time to load
from hbll import cli, data

data.digits()

for line in sys.stdin:
    job = json.loads(line)
    if "wait" in job:
        ends, found = time.monotonic() + job["seconds"], (0, 0)
        while not found[0] and time.monotonic() < ends:
            found = os.waitpid(job["wait"], os.WNOHANG)
            time.sleep(0.01)
        print(os.waitstatus_to_exitcode(found[1]) if found[0] else "hangs", flush=True)
        continue
    if pid := os.fork():
        print(pid, flush=True)
        continue
    os.environ.update(job["environment"])
    sys.orig_argv = [sys.executable, "-m", "hbll", *job["arguments"]]
    for number in (1, 2):
        os.dup2(os.open(job["files"][number - 1], os.O_WRONLY | os.O_CREAT), number)
    code = 1
    try:
        cli.main(job["arguments"])
        code = 0
    except SystemExit as stop:
        code = stop.code
    finally:
        os._exit(code)
"""


@dataclass(frozen=True)
class Ended:
    """What became of a process."""

    code: int | str
    out: str
    err: str


class Launcher:
    """Starts processes that train together.

    Args:
        folder: for what they write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = os.pathsep.join([str(ROOT / "src"), *sys.path])
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "FATAL"},
        )
        self.files: dict[int, tuple[Path, Path]] = {}

    def start(
        self, world: int, *arguments: object, ranks=None, folders=None, port=None, **environment: str
    ) -> list[int]:
        """Their process ids.

        Args:
            world: how many there are.
            arguments: of the command.
            ranks: those that are started; by default all.
            folders: a run folder for each of them, as on hosts without a common disk.
            port: where they meet; by default a free one.
            environment: further variables.
        """
        port = port or free_port()
        pids = []
        for rank in range(world) if ranks is None else ranks:
            told = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
            told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} | environment
            files = tuple(self.folder / f"{len(self.files)}.{name}" for name in ("out", "err"))
            own = ["--run-dir", folders[rank]] if folders else []
            job = {
                "environment": {name: str(value) for name, value in told.items()},
                "arguments": [str(argument) for argument in [*arguments, *own]],
                "files": [str(file) for file in files],
            }
            pids.append(int(self._ask(job)))
            self.files[pids[-1]] = files
        return pids

    def wait(self, pids: list[int], seconds: float = 60) -> list[Ended]:
        """What became of them, by the end of so many seconds."""
        ended = []
        for pid in pids:
            code = self._ask({"wait": pid, "seconds": seconds})
            out, err = (file.read_text() for file in self.files[pid])
            ended.append(Ended(code if code == "hangs" else int(code), out, err))
        return ended

    def run(self, world: int, *arguments: object, **options) -> list[Ended]:
        """Starts them and waits."""
        return self.wait(self.start(world, *arguments, **options))

    def end(self) -> None:
        """Ends the launcher."""
        with self.server:  # which closes its pipes, and waits
            pass

    def _ask(self, job: dict) -> str:
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        return self.server.stdout.readline().strip()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
