"""Who may use a model: forwards side by side, or one thread that has it otherwise for a while."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


class Access:
    """A lock of one model.

    Any number of threads may share it at once, in forwards that leave the model as it is. One that
    changes the model, for good or for a while, has it for itself; it may nest both kinds of use.
    Who waits to change the model comes before those that begin to share it after that.
    """

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._sharing: Counter[int] = Counter()  # by thread
        self._owner: int | None = None
        self._depth = 0
        self._waiting = 0

    def __reduce__(self) -> tuple[type[Access], tuple[()]]:
        return Access, ()  # a copy of a model is nobody's yet

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Within it nobody else changes the model."""
        me, counted = threading.get_ident(), False
        try:
            with self._free:
                self._free.wait_for(lambda: self._may_share(me))
                self._sharing[me] += 1
                counted = True
            yield
        finally:
            with self._free:
                if counted:
                    self._sharing[me] -= 1
                self._sharing = +self._sharing
                self._free.notify_all()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Within it no other thread uses the model.

        Raises:
            RuntimeError: called within `shared`, where two threads could wait for each other.
        """
        me, owns = threading.get_ident(), False
        try:
            with self._free:
                if self._owner != me and self._sharing[me]:
                    raise RuntimeError(
                        "CLEAR: a model cannot be changed from within its own forward pass; do it "
                        "before or after."
                    )
                self._waiting += 1
                try:
                    self._free.wait_for(lambda: self._may_own(me))
                finally:
                    self._waiting -= 1
                self._owner, self._depth = me, self._depth + 1
                owns = True
            yield
        finally:
            with self._free:
                if owns:
                    self._depth -= 1
                    self._owner = self._owner if self._depth else None
                self._free.notify_all()

    def _may_share(self, me: int) -> bool:
        if self._owner is not None:
            return self._owner == me
        return bool(self._sharing[me]) or not self._waiting

    def _may_own(self, me: int) -> bool:
        others = any(count for thread, count in self._sharing.items() if thread != me)
        return self._owner in (None, me) and not others
