"""Finished images as JSON or as events, piece by piece: an 8K image is never in memory whole."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse

# Of a file, read at once: whole groups of base64.
_BLOCK = 3 * 2**18


class Pieces(StreamingResponse):
    """An answer in pieces.

    Args:
        pieces: one after the other.
        kind: its media type.
        at_end: called when all are sent, or the caller has gone away, even before the first.
    """

    def __init__(self, pieces: AsyncIterator[bytes], kind: str, at_end: Callable[[], None]) -> None:
        super().__init__(pieces, media_type=kind, headers={"cache-control": "no-store"})
        self._at_end = at_end

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._at_end()


async def with_file(content: dict[str, Any], path: Path) -> AsyncIterator[bytes]:
    """A JSON object, and in it as "b64_json" a file.

    Args:
        content: the rest of it.
        path: of the file.
    """
    yield b'{"b64_json": "'
    with path.open("rb") as file:
        while block := await run_in_threadpool(file.read, _BLOCK):
            yield base64.b64encode(block)
    rest = json.dumps(content)
    yield b'", ' + rest[1:].encode() if content else b'"}'


def event(name: str, content: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return f"event: {name}\ndata: {json.dumps(content)}\n\n".encode()


async def event_with_file(name: str, content: dict[str, Any], path: Path) -> AsyncIterator[bytes]:
    """The same, with a file as "b64_json"."""
    yield f"event: {name}\ndata: ".encode()
    async for piece in with_file(content, path):
        yield piece
    yield b"\n\n"
