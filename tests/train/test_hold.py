import os
import subprocess
import sys

import pytest

from hbll.train.hold import held


def test_a_folder_is_held_by_one_and_its_holder_is_told(tmp_path):
    folder = tmp_path / "new" / "folder"
    said = f"folder is being written by process {os.getpid()} on "
    with held(folder), pytest.raises(ValueError, match=said), held(folder):
        pytest.fail("it is held twice")
    with held(folder):
        pass


def test_an_error_inside_frees_it(tmp_path):
    with pytest.raises(KeyError), held(tmp_path):
        raise KeyError
    with held(tmp_path):
        pass


def test_a_kill_frees_the_folder(tmp_path):
    code = (
        "import pathlib, sys; from hbll.train.hold import held\n"
        "with held(pathlib.Path(sys.argv[1])): print(flush=True); input()"
    )
    command = [sys.executable, "-c", code, tmp_path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(ValueError, match=f"process {process.pid} on "), held(tmp_path):
            pytest.fail("two processes hold it")
        process.kill()
        process.wait()
    with held(tmp_path):
        pass
