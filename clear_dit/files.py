"""Writing a file whole or not at all, and folders of which one process at a time is the owner."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .errors import RequestError

# The demo pipelines, and weights distilled for the first.
ASSETS = Path(__file__).parent / "assets"

# Files being written have names that begin so; a killed process leaves one.
TEMPORARY_PREFIX = ".clear-dit-"


def check_writable(path: Path, suffixes: Sequence[str] = (".png",)) -> None:
    """Refuse an output path before any work is done for it.

    Args:
        path: of the file to be written.
        suffixes: of the formats it may have.

    Raises:
        RequestError: another suffix, no such folder, a folder in its place, no permission.
    """
    if path.suffix.lower() not in suffixes:
        raise RequestError(f"--out must end in {' or '.join(suffixes)}, got {str(path)!r}.")
    if len(path.name.encode()) <= 255 and path.is_dir():
        raise RequestError(f"--out is a folder: {path}. Name a file in it.")
    if not path.parent.is_dir():
        raise RequestError(f"--out: there is no folder {path.parent}. Create it first.")
    try:
        path.exists()  # refuses a name that is too long
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise RequestError(f"--out: cannot write {path} ({error.strerror}).") from error


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write that gets its name `path` only when it is complete and on the disk.

    Raises:
        OSError: the disk is full or the folder is gone; nothing is left behind, and a file that
            had the name keeps it.
    """
    handle, name = tempfile.mkstemp(
        prefix=TEMPORARY_PREFIX, suffix=path.suffix or ".tmp", dir=path.parent
    )
    os.close(handle)  # opened again below: a file has its name then, which tifffile asks for
    temporary = Path(name)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def own_folder(path: Path, option: str = "--out") -> Iterator[None]:
    """Make a folder and keep other processes that would own it out, until the end or death.

    What a killed owner left half-written in it and in the folders below is removed.

    Raises:
        RequestError: it cannot be made or written in, or another process is at work in it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / ".lock").open("wb")
    except OSError as error:
        raise RequestError(
            f"{option}: cannot write in the folder {path} ({error.strerror})."
        ) from error
    with lock:
        if sys.platform != "win32":
            import fcntl

            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RequestError(
                    f"{option}: another process is at work in {path}; wait for it or name "
                    "another folder."
                ) from error
        for left in path.rglob(f"{TEMPORARY_PREFIX}*"):
            left.unlink()
        yield
