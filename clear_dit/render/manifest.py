"""manifest.jsonl: what became of every job of all files that were rendered into a folder.

A line for each job, file by file and in the order of each, while nothing runs. A running process
appends a line whenever something changes, and the last line of an id counts; a torn line, which a
killed process may leave, does not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..files import whole_file
from .claims import Claims
from .jobs import Job

FILE = "manifest.jsonl"
DONE, FAILED, WAITING, REMOVED = "done", "failed", "waiting", "removed"
# What a line begins with: one that is appended, one of a manifest in order.
_BEGINNINGS = (b'{"id": ', b'{"line": ')

Entry = dict[str, Any]


def entry_of(job: Job, status: str, **more: Any) -> Entry:
    """What the manifest says of a job.

    Args:
        job: which.
        status: "done": the image is there; "failed": `error` says why; "waiting": not yet.
        more: error, and seconds of the generation.
    """
    request = job.request
    return {
        "id": job.name,
        "status": status,
        "line": job.line,
        "image": job.image,
        "prompt": request.prompt,
        "height": request.height,
        "width": request.width,
        "seed": request.seed,
        "job": job.identity,
        **more,
    }


def read_manifest(path: Path) -> dict[str, Entry]:
    """The entries of a manifest by id, whether a process is at work or not.

    Raises:
        OSError: it cannot be read.
    """
    entries = _entries(path.read_bytes())
    return {name: entry for name, entry in entries.items() if entry["status"] != REMOVED}


def check_own(path: Path) -> None:
    """Refuse a file that has the manifest's name and is another's; there need not be one.

    Raises:
        RequestError: it is none that this program wrote, or cannot be read.
    """
    try:
        lines = [line.strip(b"\0 \t\r") for line in path.read_bytes().split(b"\n")]
    except FileNotFoundError:
        return
    except OSError as error:
        raise RequestError(f"--out: {path} cannot be read ({error.strerror}).") from error
    if not all(_is_own(line) for line in lines if line):
        raise RequestError(
            f"--out: there is a {path} that no render wrote; move it away, or name another folder."
        )


def _is_own(line: bytes) -> bool:
    try:
        entry = json.loads(line)
    except RecursionError:
        return False
    except ValueError:  # torn, maybe
        return any(line[: len(begin)] == begin[: len(line)] for begin in _BEGINNINGS)
    known = (DONE, FAILED, WAITING, REMOVED)
    return (
        isinstance(entry, dict) and {"id", "job"} <= entry.keys() and entry.get("status") in known
    )


def of_another_file(entry: Entry, file: str) -> bool:
    """Whether an entry is of another job file; those of earlier versions do not say so."""
    return bool(entry.get("file", file) != file)


def says(entry: Entry, other: Entry) -> bool:
    """Whether an entry tells of the same job, with the same status."""
    return all(entry.get(key) == other[key] for key in ("id", "job", "status"))


def job_file(path: Path, folder: Path) -> str:
    """How a job file is called in the manifest of a folder: by its place from there."""
    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()


def refuse_anothers(job: Job, told: Entry | None, file: str, folder: Path) -> None:
    """Refuse the id of a job of another file.

    Args:
        job: of `file`, see `job_file`.
        told: what the folder's manifest says of the id, if anything.

    Raises:
        RequestError: it is another job.
    """
    if told is not None and told.get("job") != job.identity and of_another_file(told, file):
        other = os.path.normpath(folder / told["file"])
        raise RequestError(
            f"the id {job.name!r} is that of another job in this folder, of line {told['line']} of "
            f"{other}; give it another id, or name another folder."
        )


def write_manifest(path: Path, entries: Iterable[Entry]) -> None:
    """Write one line for each entry, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    with whole_file(path) as file:
        file.write(_lines(entries))


def merged(path: Path, entries: Iterable[Entry], file: str) -> list[Entry]:
    """The entries of a manifest, those of one job file replaced.

    What another file's entry says already stays as it is.

    Args:
        path: of the manifest, which need not be there.
        entries: all of the file's.
        file: the job file, from the manifest's folder.

    Raises:
        OSError: it cannot be read.
    """
    told = read_manifest(path) if path.exists() else {}
    new = {
        entry["id"]: {**entry, "file": file}
        for entry in entries
        if not (says(other := told.get(entry["id"], {}), entry) and of_another_file(other, file))
    }
    kept = {name: one for name, one in told.items() if name in new or one.get("file") != file}
    return list((kept | new).values())


class Manifest:
    """The manifest of a folder in which other processes may be at work too.

    Args:
        folder: with the images.
        claims: of that folder.
        file: the job file, from the folder: entries that are added are of it.
    """

    def __init__(self, folder: Path, claims: Claims, file: str) -> None:
        self.path: Path = folder / FILE
        self.file = file
        self._claims = claims
        # Which file was read, and how much of it.
        self._read: tuple[int, int] = (0, 0)

    def begin(self, entries: Iterable[Entry]) -> None:
        """Start anew, but for other job files; only where no other process is present."""
        with self._claims.writing():
            write_manifest(self.path, merged(self.path, entries, self.file))

    def entries(self) -> dict[str, Entry]:
        """All that was said so far, by id."""
        with self._claims.writing():
            return read_manifest(self.path) if self.path.exists() else {}

    def add(self, *entries: Entry) -> None:
        """Say something new of jobs."""
        with self._claims.writing(), self.path.open("a+b") as file:
            size = file.seek(0, 2)
            if size:
                file.seek(size - 1)
                if file.read(1) != b"\n":  # a line that its writer did not live to end
                    file.write(b"\n")
            file.write(_lines({**entry, "file": self.file} for entry in entries))

    def news(self) -> dict[str, Entry]:
        """What was said since this was last asked, by this process or another."""
        found = self.path.stat()
        number, offset = self._read
        if found.st_ino != number or found.st_size < offset:
            offset = 0
        if found.st_size == offset:
            return {}
        with self.path.open("rb") as file:
            file.seek(offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]  # what follows is still being written
        self._read = (found.st_ino, offset + len(whole))
        return _entries(whole)

    def compact(self) -> None:
        """One line for each job again, in the order of the job files; when all others are gone."""
        with self._claims.writing():
            write_manifest(self.path, _in_order(read_manifest(self.path).values()))


def _lines(entries: Iterable[Entry]) -> bytes:
    return "".join(f"{json.dumps(entry, ensure_ascii=False)}\n" for entry in entries).encode()


def _entries(text: bytes) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for line in text.split(b"\n"):
        try:
            entry = json.loads(line)
            entries[entry["id"]] = {"line": 0, **entry, "status": entry["status"]}
        except (ValueError, KeyError, TypeError):
            continue  # empty or torn
    return entries


def _in_order(entries: Collection[Entry]) -> list[Entry]:
    """By file, as these came into the folder, and by places in it."""
    files = dict.fromkeys(entry.get("file") for entry in entries)
    ranks = {file: rank for rank, file in enumerate(files)}
    return sorted(
        entries, key=lambda entry: (ranks[entry.get("file")], entry["line"], entry.get("seed", 0))
    )
