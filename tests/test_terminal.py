"""What a command writes on, closed, full or narrow. Oracle: what the same writes do in a shell."""

import importlib
import io
import os
import signal
import subprocess
import sys
import time
import warnings

import pytest

from hbll.terminal import terminal


def test_closed_streams_take_everything(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with terminal():
        print("result", flush=True)
        print("progress", file=sys.stderr, flush=True)
    assert sys.stdout is sys.stderr is None


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_stderr_ends_nothing(monkeypatch):
    full = open("/dev/full", "w")  # noqa: SIM115
    monkeypatch.setattr(sys, "stderr", full)
    with terminal():
        for _ in range(2):
            print("progress", file=sys.stderr, flush=True)
        print("x" * 2**20, file=sys.stderr)
        assert not sys.stderr.isatty()
    with pytest.raises(OSError, match="No space left"):
        full.close()


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # the latter in the locale C
def test_what_the_encoding_lacks_is_a_question_mark(monkeypatch, errors):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii", errors=errors))
    with terminal():
        print("1.5 ± 0.1", flush=True)
    assert written.getvalue() == b"1.5 ? 0.1\n"


def test_a_warning_takes_a_line(capsys):
    with terminal(), warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.warn("it diverges", stacklevel=1)
    assert capsys.readouterr() == ("", "hbll: it diverges\n")


def test_sigterm_is_ctrl_c_inside():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), terminal():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_what_is_being_loaded_is_not_interrupted(tmp_path, monkeypatch, stop):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs deaf to it
    (tmp_path / f"slow_{stop}.py").write_text(f"import signal\nsignal.raise_signal({int(stop)})\nloaded = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    loaded = []

    def command():
        loaded.append(importlib.import_module(f"slow_{stop}").loaded)
        time.sleep(60)

    with pytest.raises(KeyboardInterrupt), terminal():
        command()
    assert loaded == [True]
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("closed", "arguments", "code"), [(">&-", "--version", 0), ("2>&-", "trian", 2)])
def test_a_command_ends_as_it_would_have(closed, arguments, code):
    command = f'"{sys.executable}" -m hbll {arguments} {closed}'
    process = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert (process.returncode, process.stdout, process.stderr) == (code, "", "")
