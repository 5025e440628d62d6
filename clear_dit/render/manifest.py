"""manifest.jsonl: what became of every job.

A line for each job, in the order of the job file, while nothing runs. A running process appends a
line whenever something changes, and the last line of an id counts; a torn line, which a killed
process may leave, does not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..files import whole_file
from .claims import Claims
from .jobs import Job

FILE = "manifest.jsonl"
DONE, FAILED, WAITING, REMOVED = "done", "failed", "waiting", "removed"

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


def write_manifest(path: Path, entries: Iterable[Entry]) -> None:
    """Write one line for each entry, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    with whole_file(path) as file:
        file.write(_lines(entries))


class Manifest:
    """The manifest of a folder in which other processes may be at work too."""

    def __init__(self, folder: Path, claims: Claims) -> None:
        self.path = folder / FILE
        self._claims = claims
        # Which file was read, and how much of it.
        self._read: tuple[int, int] = (0, 0)

    def begin(self, entries: Iterable[Entry]) -> None:
        """Start anew; only where no other process is present."""
        with self._claims.writing():
            write_manifest(self.path, entries)

    def entries(self) -> dict[str, Entry]:
        """All that was said so far, by id."""
        with self._claims.writing():
            return read_manifest(self.path)

    def add(self, *entries: Entry) -> None:
        """Say something new of jobs."""
        with self._claims.writing(), self.path.open("a+b") as file:
            size = file.seek(0, 2)
            if size:
                file.seek(size - 1)
                if file.read(1) != b"\n":  # a line that its writer did not live to end
                    file.write(b"\n")
            file.write(_lines(entries))

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
        """One line for each job again, in the order of the job file; when all others are gone."""
        with self._claims.writing():
            entries = sorted(read_manifest(self.path).values(), key=_place)
            write_manifest(self.path, entries)


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


def _place(entry: Entry) -> tuple[int, int]:
    """Of its job in the job file."""
    return entry["line"], entry.get("seed", 0)
