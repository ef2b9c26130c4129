"""Scripts that are run in several processes at once."""

import os
import subprocess
import sys


def launched(script, world, *arguments, path):
    """The processes' exit codes and what they wrote on stderr."""
    command = [sys.executable, "-c", script]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(["src", ".", *sys.path])}
    started = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(path / "store"), *arguments],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    ended = [process.communicate(timeout=120)[1] for process in started]
    return [process.returncode for process in started], ended
