import pytest

from hbll import machine


def test_more_than_the_machine_is_refused(monkeypatch):
    machine.refuse_beyond(machine.machine_bytes(), "a fit")
    monkeypatch.setattr(machine, "machine_bytes", lambda: 2.0**30)
    with pytest.raises(ValueError, match="a fit would need 3 GiB of memory, and this machine has 1 GiB"):
        machine.refuse_beyond(3 * 2.0**30, "a fit")
