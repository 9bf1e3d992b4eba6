"""A limit to how long one call may take, by the alarm of the operating system."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

LIMIT = 60  # seconds; calls here take milliseconds


class Impatient(BaseException):
    """A call took too long. No Exception, so that nothing inside takes it for one of its own."""


@contextmanager
def patience(seconds: int = LIMIT) -> Iterator[None]:
    """Raise Impatient inside after so many seconds, where the system has alarms and this is the main thread."""
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: object) -> None:
        raise Impatient

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
