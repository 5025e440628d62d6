"""Connections that ask for nothing: closed after a while, and few of one address."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from .caller import address_of

# Connections at once, and of one address where that is a visitor's and not a proxy's.
MAX_CONNECTIONS = 400
MAX_OF_ADDRESS = 200
# Seconds in which a request's header has to come, and how often so long nothing may be read of what
# was sent: systems hold megabytes of it for who reads slowly.
PATIENCE = 20.0
UNREAD = 15


class Connection(H11Protocol):
    """Uvicorn's, which waits for ever for the first request of a connection."""

    of_address = MAX_CONNECTIONS
    patience = PATIENCE
    unread_looks = UNREAD

    def connection_made(self, transport: Any) -> None:
        """Close it at once where its address has enough, else when it has asked for nothing."""
        super().connection_made(transport)
        self._look_again: asyncio.TimerHandle | None = None
        self._unread, self._looks = 0, 0
        self._address = address_of({"client": self.client})
        mine = sum(getattr(one, "_address", None) == self._address for one in self.connections)
        if mine > self.of_address:
            transport.abort()
            return
        self._wait(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is closed."""
        if self._look_again is not None:
            self._look_again.cancel()
        super().connection_lost(exc)

    def _wait(self, answered: Any) -> None:
        self._look_again = self.loop.call_later(self.patience, self._look, answered)

    def _look(self, answered: Any) -> None:
        """Close it if nothing was asked since the last look, which found `answered` so.

        Or if of what was sent nothing has been read for several looks.
        """
        unread = self.transport.get_write_buffer_size()
        self._looks = self._looks + 1 if unread and unread == self._unread else 0
        self._unread = unread
        idle = not unread and (self.cycle is None or self.cycle.response_complete)
        if self._looks >= self.unread_looks:
            self.transport.abort()
        elif idle and self.cycle is answered:
            self.transport.close()
        else:
            self._wait(self.cycle if idle else None)


class OneOfMany(Connection):
    """Where the addresses of connections are those of visitors."""

    of_address = MAX_OF_ADDRESS
