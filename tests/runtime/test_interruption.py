"""Real signals: the first asks for a stop, the second stops, and afterwards all is as before."""

import os
import signal
import time

import pytest

from cotrain.runtime.interruption import StopRequest

BOTH = (signal.SIGINT, signal.SIGTERM)


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    # The handler runs in the main thread, once that is between two instructions.
    time.sleep(0.01)


@pytest.fixture(autouse=True)
def handlers_come_back():
    before = [signal.getsignal(number) for number in BOTH]
    yield
    assert [signal.getsignal(number) for number in BOTH] == before


@pytest.mark.parametrize("number", BOTH)
def test_first_signal_asks_and_the_work_goes_on(number):
    done = []
    with StopRequest() as stop:
        assert not stop.received
        for step in range(5):
            if step == 2:
                send(number)
            done.append(step)
            if stop.received:
                break
    assert done == [0, 1, 2]


@pytest.mark.parametrize("first", BOTH)
@pytest.mark.parametrize("second", BOTH)
def test_second_signal_acts_at_once(first, second):
    with StopRequest() as stop:
        send(first)
        assert stop.received
        with pytest.raises(KeyboardInterrupt):
            send(second)


def test_handlers_are_restored_after_an_error():
    before = [signal.getsignal(number) for number in BOTH]
    with pytest.raises(KeyboardInterrupt), StopRequest():  # noqa: PT012
        send(signal.SIGTERM)
        assert [signal.getsignal(number) for number in BOTH] != before
        send(signal.SIGTERM)
    assert [signal.getsignal(number) for number in BOTH] == before


def test_after_it_ctrl_c_is_what_it_was():
    # A shell starts its background jobs with Ctrl-C ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopRequest():
            pass
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_handlers_of_the_program_around_are_kept():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with StopRequest() as stop:
            send(signal.SIGTERM)
        assert stop.received
        assert heard == []
        send(signal.SIGTERM)
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
