"""SIGTERM and Ctrl-C as requests to stop."""

import signal
from pathlib import Path

import pytest

from peftcli.compare.run import VariantRunner
from peftcli.train.stop import StopRequests


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_request_inside_and_the_handlers_before_are_restored(tmp_path: Path, number: int) -> None:
    received: list[int] = []
    outside = signal.signal(number, lambda got, frame: received.append(got))
    try:
        with StopRequests(tmp_path, None) as stops, pytest.raises(ZeroDivisionError), VariantRunner() as runner:
            signal.raise_signal(number)
            assert runner.stopped_by == signal.Signals(number).name and stops.requested() is None
            raise ZeroDivisionError  # the handlers are restored on the way out of an error too
        with stops:
            signal.raise_signal(number)
            assert stops.requested() == signal.Signals(number).name
        assert not received
        signal.raise_signal(number)
        assert received == [number]
    finally:
        signal.signal(number, outside)
