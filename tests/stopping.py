"""A run that Ctrl-C stops and that is taken up again."""

import signal
from dataclasses import replace
from pathlib import Path

import pytest

from hbll.train.loop import Interrupted, train
from hbll.train.run import Run


def stopped_and_resumed(whole: Run, folder: Path, after: int) -> Run:
    """The same run in another folder, stopped once so many steps were made."""
    stopped = replace(whole, folder=folder)

    def press_ctrl_c(done, steps):
        if done == after:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        train(stopped, on_step=press_ctrl_c)
    train(stopped, resume=True)
    return stopped
