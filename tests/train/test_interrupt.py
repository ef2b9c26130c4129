import signal

import pytest

from hbll.train.interrupt import SIGNALS, deferred_interrupt


@pytest.fixture(autouse=True)
def listening():
    """A shell starts background jobs deaf to interrupts."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_the_first_interrupt_only_asks_and_the_second_interrupts(first, second):
    with deferred_interrupt() as interrupted:
        assert not interrupted()
        signal.raise_signal(first)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(second)


def test_afterwards_interrupts_are_as_before():
    before = [signal.getsignal(number) for number in SIGNALS]
    with deferred_interrupt():
        pass
    assert [signal.getsignal(number) for number in SIGNALS] == before
