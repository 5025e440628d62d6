"""Ctrl-C: once to end after the current image, twice to end now."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# Seconds within which two signals are one.
_SAME_WISH = 0.5


class Stop:
    """Whether somebody asked to end.

    Attributes:
        asked: it is so; the work ends after the current image.
    """

    def __init__(self) -> None:
        self.asked = False

    def sleep(self, seconds: float) -> None:
        """Wait, but not on after somebody asked to end."""
        end = time.monotonic() + seconds
        while not self.asked and time.monotonic() < end:
            time.sleep(min(0.1, seconds))


@contextmanager
def stop_by_signal() -> Iterator[Stop]:
    """Within it SIGINT and SIGTERM ask to end; the second raises KeyboardInterrupt.

    In a thread other than the main one, which gets no signals, nothing asks.
    """
    stop, first = Stop(), 0.0

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if stop.asked:
            # A launcher passes on what the terminal has sent already: both are one wish.
            if time.monotonic() - first > _SAME_WISH:
                raise KeyboardInterrupt
            return
        stop.asked, first = True, time.monotonic()
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        print(f"\n{name}: finishing this image; once more stops now.", file=sys.stderr)

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {one: signal.signal(one, on_signal) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
