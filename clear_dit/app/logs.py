"""A log that no visitor can fill."""

from __future__ import annotations

import logging
import threading
import time


class Bounded(logging.Filter):
    """Lets a burst of records through, then some a second; says how many it held back.

    Args:
        burst: records.
        a_second: records.
        characters: of a record's text, and of its traceback's end.
    """

    def __init__(self, burst: int = 100, a_second: float = 1.0, characters: int = 2000) -> None:
        super().__init__()
        self._burst, self._a_second, self._characters = burst, a_second, characters
        self._left, self._when, self._held_back = float(burst), time.monotonic(), 0
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is written; what is too long in it is cut."""
        with self._lock:
            now = time.monotonic()
            self._left = min(self._burst, self._left + self._a_second * (now - self._when))
            self._when = now
            if self._left < 1:
                self._held_back += 1
                return False
            self._left -= 1
            held_back, self._held_back = self._held_back, 0
        text = record.getMessage().replace("\n", " ").replace("\r", " ")[: self._characters]
        if held_back:
            text += f" ({held_back} records before this were left out)"
        record.msg, record.args = text, ()
        if record.exc_info and not record.exc_text:
            trace = logging.Formatter().formatException(record.exc_info)
            record.exc_text = trace[-self._characters :]
        return True


def bound_log() -> None:
    """Bound what the handlers of the root logger write, of all loggers."""
    bounded = Bounded()
    for handler in logging.getLogger().handlers:
        handler.addFilter(bounded)
