"""What a command writes on and what stops it, set up so that neither ends work for no good reason."""

import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from io import TextIOWrapper
from types import FrameType
from typing import Any, TextIO


class Heedless:
    """A text stream that loses what cannot be written, because its reader has left or its disk is full."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _show_warning(message: Warning | str, *_: Any) -> None:
    print(f"hbll: {message}", file=sys.stderr)


def _stop(signum: int, frame: FrameType | None) -> None:
    """Raises KeyboardInterrupt; while modules are loaded, for which torch would abort the process, a moment later."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            # To the main thread itself: raised in another one, it would not end what this one waits for.
            threading.Timer(0.05, signal.pthread_kill, [threading.main_thread().ident, signum]).start()
            return
        frame = frame.f_back
    raise KeyboardInterrupt


@contextmanager
def terminal() -> Iterator[None]:
    """Inside, streams and signals are as every command wants them.

    A stream that was closed from the start takes everything and keeps nothing. Stdout has ``?`` for what its encoding
    lacks. Stderr, which shows progress and errors alone, never fails. Warnings take a line each. A terminal without
    columns has the usual number. SIGTERM, which batch systems send, is Ctrl-C.
    """
    with ExitStack() as stack:
        # Opened in this order, they take the descriptors of the closed ones, which the next file would get otherwise.
        stdout, stderr = (
            stack.enter_context(open(os.devnull, "w")) if stream is None else stream
            for stream in (sys.stdout, sys.stderr)
        )
        # In the locale C Python writes by surrogateescape, which lacks the same characters.
        if isinstance(stdout, TextIOWrapper) and stdout.errors in ("strict", "surrogateescape"):
            stdout.reconfigure(errors="replace")
        stack.enter_context(redirect_stdout(stdout))
        stack.enter_context(redirect_stderr(Heedless(stderr)))
        stack.enter_context(warnings.catch_warnings())
        warnings.showwarning = _show_warning  # pyrefly: ignore
        if os.environ.get("COLUMNS") == "0":
            del os.environ["COLUMNS"]
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as a shell has it for jobs in the background
                stack.callback(signal.signal, number, signal.signal(number, _stop))
        yield
