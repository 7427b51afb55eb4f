"""A limit on the time that a chat template may take, since it is a program that came with somebody's model."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from peftcli.errors import DataError

PROBE_SECONDS = 10.0
"""For a chat of two turns; a template writes it in a thousandth of that."""
BATCH_SECONDS = 120.0
"""For a batch of rows."""


@contextmanager
def template_time(seconds: float) -> Iterator[None]:
    """End the block with an error when it takes longer; only the main thread can hear the clock.

    Raises:
        DataError: the time is over.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    said = DataError(
        f"the chat template was still at work after {seconds:g} s; set model.chat_template to one without endless loops"
    )
    rung = False

    def ring(number: int, frame: FrameType | None) -> None:
        nonlocal rung
        rung = True
        raise said

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except Exception:
        if rung:  # Jinja rewrites what is raised in a template, and stumbles over an error between two lines
            raise said from None
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
