"""Requests that take a while to answer: few at once, and few of each party."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from .caller import Caller
from .jobs import LimitError

AT_ONCE = 2
OF_PARTY = 8


class Turns:
    """Those of one server, on its event loop."""

    def __init__(self) -> None:
        self._present: Counter[str] = Counter()
        self._free = asyncio.Semaphore(AT_ONCE)

    @asynccontextmanager
    async def turn(self, caller: Caller) -> AsyncIterator[None]:
        """Wait for a turn, and have it inside.

        Raises:
            LimitError: as many requests of the caller's party wait or are answered.
        """
        if self._present[caller.party] >= OF_PARTY:
            raise LimitError("Too many requests at once; try again in a moment.", 1)
        self._present[caller.party] += 1
        try:
            async with self._free:
                yield
        finally:
            self._present[caller.party] -= 1
            self._present += Counter()  # without those that are gone
