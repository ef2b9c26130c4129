"""Workers that wait for a lost one.

Nothing of a process group that has lost a process can be used again, and what its threads still wait for may hang. So
whoever loses another process begins its program anew, as the same process, and meets the others, among them the one that
was started again, as at the start of a run that is resumed.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from hbll.train.run import CONFIGURATION

__all__ = ["LostError", "waiting"]

TORCHRUN = "TORCHELASTIC_RUN_ID"
"""A variable of processes that torchrun has started."""

TOLD = "HBLL_WAITING"
"""A variable of programs begun anew: how often in a row without an epoch between, and the sentence to end with."""

LOSSES = 3
"""Without an epoch between. More come of what waiting does not mend, such as steps that take longer than the timeout."""


class LostError(ConnectionError):
    """Another process of a run is lost.

    Args:
        what: which, and what this one keeps.
        advice: how the run goes on.
        folder: of the run.
        advanced: whether an epoch was finished since this process began.
    """

    def __init__(self, what: str, advice: str, folder: Path, advanced: bool) -> None:
        super().__init__(what + advice)
        self.what, self.folder, self.advanced = what, folder, advanced


@contextmanager
def waiting(seconds: float, run_dir: Path | None, resume: bool) -> Iterator[None]:
    """Inside, this process joins others and trains with them; when one is lost it begins its program anew.

    Before the first checkpoint it does not: nothing is lost then either.

    Args:
        seconds: for which the program is to wait then.
        run_dir, resume: what it was told.

    Raises:
        ValueError: what was lost has not come back, or torchrun has started the process.
        KeyboardInterrupt: Ctrl-C or SIGTERM, which says from where the run goes on, meanwhile too.
        ConnectionError: another process is lost before the first checkpoint, or too often.
    """
    if TORCHRUN in os.environ:
        raise ValueError(
            "torchrun ends all processes when it loses one, and none can wait: leave --wait-for-stages out, or start them "
            "one by one"
        )
    times, _, sentence = os.environ.get(TOLD, "0").partition(" ")
    try:
        yield
    except TimeoutError as error:
        raise ValueError(sentence or str(error)) from error
    except KeyboardInterrupt as error:  # which says nothing yet while the process waits
        raise KeyboardInterrupt(str(error) or sentence) from error
    except BrokenPipeError:  # of whoever reads the output
        raise
    except ConnectionError as error:
        what, folder, count = str(error), run_dir if resume else None, int(times) + 1
        if isinstance(error, LostError):
            what, folder, sentence, count = error.what, error.folder, str(error), 1 if error.advanced else count
        if folder is None or not (folder / CONFIGURATION).exists() or count > LOSSES:
            raise
        start = f"start it again by the same command, with --run-dir {folder} --resume"
        print(f"hbll: {what}; waiting up to {seconds:g} seconds for what is lost: {start}", file=sys.stderr, flush=True)
        os.environ[TOLD] = f"{count} {sentence or error}"
        _begin_anew([] if resume else ["--run-dir", str(folder), "--resume"])


def _begin_anew(arguments: list[str]) -> NoReturn:
    """Puts this program's beginning in its place, with further arguments."""
    sys.stdout.flush()
    for name in os.listdir("/dev/fd"):  # gloo's connections would stay open, and the other ends not know of the loss
        if int(name) > 2:
            with suppress(OSError):  # of the listing itself
                os.set_inheritable(int(name), False)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:], *arguments])
