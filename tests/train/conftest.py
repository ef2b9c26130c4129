"""What tests of runs share: processes that train together, and commands where there is no launcher."""

import pytest
from tests.training import Launcher

from hbll.distributed.launch import VARIABLES


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    found = Launcher(tmp_path_factory.mktemp("processes"))
    yield found
    found.end()


@pytest.fixture
def alone(command, monkeypatch):
    """Runs a command in this process, where no launcher says anything: its exit code, and what it wrote on stderr."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return lambda *arguments: command(*arguments)[::2]
