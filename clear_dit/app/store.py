"""Images and what is known of them, on the disk: a folder for each visitor, one in it per job.

    visitors/SHA-256 OF THE VISITOR'S SECRET/JOB/job.json, clear.png, clear_files/LEVEL/X_Y.jpg
    visitors/SHA-256 OF THE VISITOR'S SECRET/uploads/UPLOAD.png

A visitor is who knows the secret in the cookie; the disk does not tell it. Names of jobs and
uploads are random, 128 bits.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import secrets
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..files import whole_file

SECRET = re.compile(r"[A-Za-z0-9_-]{43}")
NAME = re.compile(r"[A-Za-z0-9_-]{22}")
UPLOADS = "uploads"
RECORD = "job.json"
# Uploads of one visitor that are kept, and jobs that a history shows.
MAX_UPLOADS = 8
MAX_HISTORY = 60
# States of a job after which nothing changes.
ENDED = ("done", "cancelled", "failed")

logger = logging.getLogger(__name__)


def new_secret() -> str:
    """For a new visitor: 256 random bits."""
    return secrets.token_urlsafe(32)


def new_name() -> str:
    """For a job or an upload: 128 random bits."""
    return secrets.token_urlsafe(16)


def visitor_of(secret: str) -> str:
    """The name of the folder of who knows this secret."""
    return hashlib.sha256(secret.encode()).hexdigest()


class Store:
    """The folder of one server.

    Args:
        root: is there, and belongs to this process (see `own_folder`).
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve() / "visitors"

    def folder(self, visitor: str, job: str) -> Path | None:
        """A visitor's folder of a job; None if there is none of this name, whoever asks."""
        if not NAME.fullmatch(job):
            return None
        folder = self.root / visitor / job
        return folder if folder.is_dir() else None

    def new_folder(self, visitor: str, job: str) -> Path:
        """Made for a new job."""
        folder = self.root / visitor / job
        folder.mkdir(parents=True)
        return folder

    def write(self, visitor: str, record: dict[str, Any]) -> None:
        """Keep what is known of a job, under its "id".

        Raises:
            OSError: the disk is full; the record before is still there.
        """
        with whole_file(self.root / visitor / record["id"] / RECORD) as file:
            file.write(json.dumps(record, ensure_ascii=False).encode())

    def read(self, visitor: str, job: str) -> dict[str, Any] | None:
        """The record of a visitor's job; None if there is none."""
        folder = self.folder(visitor, job)
        return None if folder is None else _read(folder)

    def history(self, visitor: str) -> list[dict[str, Any]]:
        """A visitor's finished jobs, the newest first, `MAX_HISTORY` at most."""
        records = [_read(folder) for folder in self._jobs(self.root / visitor)]
        done = [record for record in records if record and record["state"] == "done"]
        return sorted(done, key=lambda record: -record["created"])[:MAX_HISTORY]

    def remove_images(self, visitor: str, job: str) -> None:
        """Remove what a job left that did not come to its end; its record stays."""
        folder = self.folder(visitor, job)
        for path in () if folder is None else list(folder.iterdir()):
            if path.name != RECORD:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def end_interrupted(self) -> None:
        """Say of jobs that a server before this one did not end that they failed."""
        for visitor in self._visitors():
            for folder in self._jobs(visitor):
                record = _read(folder)
                if record is None:
                    shutil.rmtree(folder)
                elif record["state"] not in ENDED:
                    self.remove_images(visitor.name, folder.name)
                    error = "The server was stopped before it was finished. Generate it again."
                    self.write(visitor.name, record | {"state": "failed", "error": error})

    def remove_older(self, days: float, now: float | None = None) -> int:
        """Remove ended jobs and uploads of which nothing changed for so long; how many."""
        limit = (time.time() if now is None else now) - days * 86400
        removed = 0
        for visitor in self._visitors():
            for folder in self._jobs(visitor):
                record = _read(folder)
                ended = record is not None and record["state"] in ENDED
                if ended and (folder / RECORD).stat().st_mtime < limit:
                    shutil.rmtree(folder)
                    removed += 1
            for written, upload in _uploads(visitor / UPLOADS):
                if written < limit:
                    upload.unlink(missing_ok=True)
                    removed += 1
        if removed:
            logger.info("removed %d jobs and uploads older than %g days", removed, days)
        return removed

    def new_upload(self, visitor: str) -> Path:
        """Where to write an upload; the oldest beyond `MAX_UPLOADS` go."""
        folder = self.root / visitor / UPLOADS
        folder.mkdir(parents=True, exist_ok=True)
        kept = sorted(_uploads(folder))
        for _, path in kept[: max(0, len(kept) - MAX_UPLOADS + 1)]:
            path.unlink(missing_ok=True)
        return folder / new_name()

    def upload(self, visitor: str, name: str) -> Path | None:
        """A visitor's upload; None if there is none of this name, whoever asks."""
        path = self.root / visitor / UPLOADS / name
        return path if NAME.fullmatch(name) and path.is_file() else None

    def _visitors(self) -> list[Path]:
        return [path for path in self.root.glob("*") if path.is_dir()]

    def _jobs(self, visitor: Path) -> list[Path]:
        return [path for path in visitor.glob("*") if NAME.fullmatch(path.name) and path.is_dir()]


def _uploads(folder: Path) -> list[tuple[float, Path]]:
    """When each was written; other threads may remove some meanwhile."""
    found = []
    for path in folder.glob("*"):
        with suppress(FileNotFoundError):
            found.append((path.stat().st_mtime, path))
    return found


def _read(folder: Path) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_bytes())
    except (OSError, ValueError):
        return None
    return record
