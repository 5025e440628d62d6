"""Who generates what, between processes that share a folder.

Every claim is a lock on one byte of one file. The system releases a process's locks when it ends,
however it ends, so no claim is ever left behind by a dead owner; and such locks, unlike `flock`,
hold between machines on NFS.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import RequestError

FILE = ".claims"
_PRESENCE, _MANIFEST, _JOBS = 0, 1, 2


# Folders of which a thread has the claims: process, device and inode.
_taken: set[tuple[int, int, int]] = set()
_taking = threading.Lock()


class Claims:
    """This process's claims in a folder; one such object at a time for a folder in a process.

    Raises:
        RequestError: the folder cannot be written in, or another thread is at work in it: the
            locks of a process hold for all its threads.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        found = folder.stat()
        self._mine = os.getpid(), found.st_dev, found.st_ino
        with _taking:
            # Before the file is opened: to close it again would end the other's claims.
            if self._mine in _taken:
                raise RequestError(
                    f"--out: another thread of this process is at work in {folder}; wait for it or "
                    "name another folder."
                )
            try:
                self._file = (folder / FILE).open("a+b")
            except OSError as error:
                raise RequestError(
                    f"--out: cannot write in the folder {folder} ({error.strerror})."
                ) from error
            _taken.add(self._mine)

    @contextmanager
    def arriving(self) -> Iterator[bool]:
        """Be present from now on; yields whether no other process is.

        Where there is none, others wait at the door until this block is left.
        """
        alone = self._lock(_PRESENCE, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not alone:
            self._lock(_PRESENCE, fcntl.LOCK_SH)
        try:
            yield alone
        finally:
            self._lock(_PRESENCE, fcntl.LOCK_SH)

    @contextmanager
    def leaving(self) -> Iterator[bool]:
        """Be present no longer; yields whether this process is the last, and keeps others out."""
        try:
            self._lock(_PRESENCE, fcntl.LOCK_UN)
            yield self._lock(_PRESENCE, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            self.close()

    def close(self) -> None:
        """Give everything up."""
        self._file.close()
        with _taking:
            _taken.discard(self._mine)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """The manifest is this process's to write in; waits for others."""
        self._lock(_MANIFEST, fcntl.LOCK_EX)
        try:
            yield
        finally:
            self._lock(_MANIFEST, fcntl.LOCK_UN)

    @contextmanager
    def job(self, name: str) -> Iterator[bool]:
        """Claim a job; yields whether it is this process's, or already another's."""
        digest = hashlib.sha256(name.lower().encode()).digest()
        byte = _JOBS + (int.from_bytes(digest[:7], "big") << 1)
        mine = self._lock(byte, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield mine
        finally:
            if mine:
                self._lock(byte, fcntl.LOCK_UN)

    def _lock(self, byte: int, operation: int) -> bool:
        try:
            fcntl.lockf(self._file, operation, 1, byte)
        except (BlockingIOError, PermissionError):  # somebody else's; POSIX allows both
            return False
        except OSError as error:
            raise RequestError(
                f"--out: the file system of {self._folder} has no locks ({error.strerror}), "
                "without which two processes may generate the same job; name a folder on another."
            ) from error
        return True
