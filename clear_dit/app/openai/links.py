"""URLs of finished images: who has one may fetch its image for an hour, without a key."""

from __future__ import annotations

import hashlib
import threading
import time
from pathlib import Path

from ..caller import new_secret
from ..store import Store

PREFIX = "/v1/images/files/"
KEEP_SECONDS = 3600.0


class Links:
    """Those of one server, until it ends. With its link an image is removed.

    Args:
        store: where the images are.
    """

    def __init__(self, store: Store) -> None:
        self._store, self._lock = store, threading.Lock()
        # By a name's SHA-256, the oldest first: until when, owner and job, and the file in it.
        self._links: dict[bytes, tuple[float, tuple[str, str], str]] = {}

    def add(self, owner: str, job: str, file: str) -> str:
        """A new name for a file of a finished job."""
        self.sweep()
        name = new_secret()
        with self._lock:
            until = time.monotonic() + KEEP_SECONDS
            self._links[_digest(name)] = until, (owner, job), file
        return name

    def find(self, name: str) -> Path | None:
        """The file of a name; None if it holds no longer, or there is none."""
        with self._lock:
            until, (owner, job), file = self._links.get(_digest(name), (0.0, ("", ""), ""))
        return self._store.file(owner, job, file) if time.monotonic() < until else None

    def sweep(self) -> None:
        """Remove what is too old."""
        with self._lock:
            now = time.monotonic()
            old = [name for name, (until, _, _) in self._links.items() if until <= now]
            jobs = [self._links.pop(name)[1] for name in old]
        for owner, job in jobs:
            self._store.remove(owner, job)


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
