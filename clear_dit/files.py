"""Writing a file whole or not at all, and folders of which one process at a time is the owner."""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .errors import RequestError

# The demo pipelines, and weights distilled for the first.
ASSETS = Path(__file__).parent / "assets"
# The pipelines' folders by name, and the side of the squares they were trained at, in pixels.
DEMOS = {"demo": ASSETS / "demo", "demo-sd3": ASSETS / "demo-sd3"}
DEMO_SIZE = 512

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
    with _unfinished(path) as temporary:
        with _on_disk(temporary) as file:
            yield file
        temporary.replace(path)


def write_new(path: Path, write: Callable[[BinaryIO], None]) -> Path:
    """Write a file that replaces none: where `path` is taken, it becomes name-2, name-3, ...

    Processes that write at once get different names.

    Args:
        path: its name, if that is free when the file is complete and on the disk.
        write: given a binary file, writes it.

    Returns:
        The name it got.

    Raises:
        OSError: see `whole_file`.
    """
    with _unfinished(path) as temporary:
        with _on_disk(temporary) as file:
            write(file)
        names = (_numbered(path, number) for number in itertools.count(1))
        return next(name for name in names if _renamed(temporary, name))


def _numbered(path: Path, number: int) -> Path:
    """name.png, name-2.png, ..., cut to what a file may be called."""
    if number == 1:
        return path
    ending = f"-{number}{path.suffix}"
    stem = path.stem.encode()[: 255 - len(ending.encode())].decode(errors="ignore")
    return path.with_name(stem + ending)


def _renamed(old: Path, new: Path) -> bool:
    """Rename a file, unless there is one of the new name: False, and nothing is changed."""
    try:
        if sys.platform == "win32":
            old.rename(new)
        else:
            new.hardlink_to(old)  # the old name goes with `_unfinished`
    except FileExistsError:
        return False
    except OSError:  # a file system without links: an empty file takes the name first
        try:
            new.touch(exist_ok=False)
        except FileExistsError:
            return False
        old.replace(new)
    return True


@contextmanager
def _unfinished(path: Path) -> Iterator[Path]:
    """An empty file beside `path`, which is gone afterwards if it still has its name."""
    handle, name = tempfile.mkstemp(
        prefix=TEMPORARY_PREFIX, suffix=path.suffix or ".tmp", dir=path.parent
    )
    os.close(handle)  # opened again: a file has its name then, which tifffile asks for
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


@contextmanager
def _on_disk(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which all may read and which is on the disk afterwards."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    path.chmod(0o644)


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
