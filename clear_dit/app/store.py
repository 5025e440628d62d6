"""Images and what is known of them, on the disk: a folder for each owner, one in it per job.

    visitors/OWNER/JOB/job.json, clear.png, clear_files/LEVEL/X_Y.jpg, image (that it enlarges)
    visitors/OWNER/uploads/UPLOAD, UPLOAD.jpg (small)

An owner is an account or who knows the secret in a cookie: see `caller`; the disk tells neither.
Names of jobs and uploads are random, 128 bits. Links are not followed: what they lead to is not
there.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..files import whole_file
from .settings import MAX_UPLOADS, MAX_UPLOADS_IN_ALL, MIN_FREE_BYTES

NAME = re.compile(r"[A-Za-z0-9_-]{22}")
UPLOADS = "uploads"
RECORD = "job.json"
# The image that a job enlarges, in its folder.
SOURCE = "image"
# Jobs that a history shows.
MAX_HISTORY = 200
# States of a job after which nothing changes, and those that a history shows.
ENDED = ("done", "cancelled", "failed", "stopped")
SHOWN = ("done", "failed", "stopped")

logger: logging.Logger = logging.getLogger(__name__)


class NoRoomError(RequestError):
    """The server's disk, or its place for uploads, is full."""


def new_name() -> str:
    """For a job or an upload: 128 random bits."""
    return secrets.token_urlsafe(16)


class Store:
    """The folder of one server.

    Args:
        root: is there, and belongs to this process (see `own_folder`).
    """

    def __init__(self, root: Path) -> None:
        self.root: Path = root.resolve() / "visitors"
        self._lock = threading.Lock()
        # Records as last read, and of which file.
        self._records: dict[Path, tuple[tuple[int, int], dict[str, Any]]] = {}

    def folder(self, owner: str, job: str) -> Path | None:
        """An owner's folder of a job; None if there is none of this name, whoever asks."""
        if not NAME.fullmatch(job):
            return None
        folder = self.root / owner / job
        own = _is_own(folder.parent) and _is_own(folder)
        return folder if own and folder.is_dir() else None

    def file(self, owner: str, job: str, *parts: str) -> Path | None:
        """A file in an owner's folder of a job; None if there is none, or by way of a link.

        Args:
            parts: of its path in there, of names that the program gave.
        """
        folder = self.folder(owner, job)
        if folder is None:
            return None
        path = folder.joinpath(*parts)
        return path if path.is_file() and path.resolve() == path else None

    def new_folder(self, owner: str, job: str) -> Path:
        """Made for a new job.

        Raises:
            RequestError: the disk is nearly full.
        """
        self.check_space()
        folder = self.root / owner / job
        with self._lock:
            folder.mkdir(parents=True)
        return folder

    def check_space(self) -> None:
        """Refuse what would fill the disk.

        Raises:
            RequestError: less than `MIN_FREE_BYTES` are free.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(self.root).free < MIN_FREE_BYTES:
            raise NoRoomError("The server's disk is nearly full; tell who runs it.")

    def write(self, owner: str, record: dict[str, Any]) -> None:
        """Keep what is known of a job, under its "id".

        Raises:
            OSError: the disk is full; the record before is still there.
        """
        with whole_file(self.root / owner / record["id"] / RECORD) as file:
            file.write(json.dumps(record, ensure_ascii=False).encode())

    def read(self, owner: str, job: str) -> dict[str, Any] | None:
        """The record of an owner's job; None if there is none."""
        folder = self.folder(owner, job)
        return None if folder is None else self._read(folder)

    def set_favourite(self, owner: str, job: str, favourite: bool) -> bool:
        """Mark an ended job; whether there is one.

        Raises:
            OSError: the disk is full.
        """
        with self._lock:
            record = self.read(owner, job)
            if record is None or record["state"] not in ENDED:
                return False
            self.write(owner, record | {"favourite": favourite})
            return True

    def remove(self, owner: str, job: str) -> bool:
        """Remove an ended job and its images; whether there was one."""
        with self._lock:
            folder = self.folder(owner, job)
            if folder is None:
                return False
            # At once, whatever others write there meanwhile.
            gone = folder.with_name(f".{job}")
            folder.rename(gone)
            self._records.pop(folder, None)
        shutil.rmtree(gone, ignore_errors=True)
        self._remove_empty(gone.parent)
        return True

    def history(self, owner: str) -> list[dict[str, Any]]:
        """An owner's ended jobs, but cancelled ones; the newest first, `MAX_HISTORY` at most."""
        records = [self._read(folder) for folder in _jobs(self.root / owner)]
        shown = [record for record in records if record and record["state"] in SHOWN]
        return sorted(shown, key=lambda record: -record["created"])[:MAX_HISTORY]

    def remove_images(self, owner: str, job: str) -> None:
        """Remove what a job left that did not come to its end; record and source stay."""
        folder = self.folder(owner, job)
        for path in () if folder is None else list(folder.iterdir()):
            if path.name not in (RECORD, SOURCE):
                shutil.rmtree(path) if path.is_dir() and _is_own(path) else path.unlink()

    def end_interrupted(self) -> None:
        """Say of jobs that a server before this one did not end that they were stopped."""
        for owner in self._owners():
            for folder in _jobs(owner):
                record = self._read(folder)
                if record is None or record["state"] == "cancelled":
                    self.remove(owner.name, folder.name)
                elif record["state"] not in ENDED:
                    self.remove_images(owner.name, folder.name)
                    error = "The server was stopped before it was finished."
                    stopped = {"state": "stopped", "error": error, "images": []}
                    self.write(owner.name, record | stopped)

    def remove_older(self, days: float, now: float | None = None) -> int:
        """Remove ended jobs and uploads of which nothing changed for so long; how many."""
        limit = (time.time() if now is None else now) - days * 86400
        removed = 0
        for owner in self._owners():
            for folder in _jobs(owner):
                record = self._read(folder)
                ended = record is not None and record["state"] in ENDED
                if ended and (folder / RECORD).lstat().st_mtime < limit:
                    removed += self.remove(owner.name, folder.name)
            for written, upload in _uploads(owner / UPLOADS):
                if written < limit:
                    _remove_upload(upload)
                    removed += 1
            self._remove_empty(owner / UPLOADS, owner)
        if removed:
            logger.info("removed %d jobs and uploads older than %g days", removed, days)
        return removed

    def new_upload(self, owner: str) -> Path:
        """An empty file for an upload; the owner's oldest beyond `MAX_UPLOADS` go.

        Raises:
            RequestError: the disk is nearly full, or there are too many of all owners.
        """
        self.check_space()
        folder = self.root / owner / UPLOADS
        if sum(len(_uploads(one / UPLOADS)) for one in self._owners()) >= MAX_UPLOADS_IN_ALL:
            raise NoRoomError("The server has too many uploads of others now; try again later.")
        path = folder / new_name()
        with self._lock:
            folder.mkdir(parents=True, exist_ok=True)
            path.touch()
        kept = sorted(_uploads(folder))
        for _, old in kept[: max(0, len(kept) - MAX_UPLOADS)]:
            _remove_upload(old)
        return path

    def forget(self, upload: Path) -> None:
        """Remove an upload; it may be gone."""
        _remove_upload(upload)
        self._remove_empty(upload.parent, upload.parent.parent)

    def upload(self, owner: str, name: str) -> Path | None:
        """An owner's upload; None if there is none of this name, whoever asks."""
        path = self.root / owner / UPLOADS / name
        own = all(map(_is_own, (path, path.parent, path.parent.parent)))
        return path if NAME.fullmatch(name) and own and path.is_file() else None

    def small_upload(self, owner: str, name: str) -> Path | None:
        """The small image of an owner's upload."""
        path = self.upload(owner, name)
        small = None if path is None else path.with_suffix(".jpg")
        return small if small is not None and _is_own(small) and small.is_file() else None

    def _remove_empty(self, *folders: Path) -> None:
        for folder in folders:
            with self._lock, suppress(OSError):  # it is not empty
                folder.rmdir()

    def _owners(self) -> list[Path]:
        return [path for path in _inside(self.root) if _is_own(path) and path.is_dir()]

    def _read(self, folder: Path) -> dict[str, Any] | None:
        path = folder / RECORD
        try:
            found = path.lstat()
            state = found.st_ino, found.st_mtime_ns
            known = self._records.get(folder)
            if known is None or known[0] != state:
                if not _is_own(path):
                    return None
                record = json.loads(path.read_bytes())
                if not isinstance(record, dict) or not {"id", "state", "created"} <= set(record):
                    return None
                known = self._records[folder] = state, _with_entry(record)
            return dict(known[1])
        except (OSError, ValueError, KeyError):
            self._records.pop(folder, None)
            return None


def _with_entry(record: dict[str, Any]) -> dict[str, Any]:
    """A record; earlier ones told the settings one by one."""
    if "entry" in record:
        return record
    attention = record["attention"]
    names = ("prompt", "model", "height", "width", "radius", "down_factor", "steps", "guidance")
    entry = {name: record[name] for name in (*names, "seed")}
    entry |= {
        "attention": "both" if len(attention) > 1 else attention[0],
        "negative_prompt": "",
        "far": None,
        "image": "",
        "strength": None,
        "lora": "",
        "lora_scale": 1.0,
    }
    kept = {name: record[name] for name in ("id", "state", "created", "error", "images")}
    more = {"entry": entry, "image_name": record["image"], "favourite": False, "command": ""}
    return kept | more


def _inside(folder: Path) -> list[Path]:
    """What is in a folder; nothing where it is gone, maybe just now by another thread."""
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _is_own(path: Path) -> bool:
    return not path.is_symlink()


def _jobs(owner: Path) -> list[Path]:
    if not _is_own(owner):
        return []
    found = _inside(owner)
    return [path for path in found if NAME.fullmatch(path.name) and _is_own(path) and path.is_dir()]


def _uploads(folder: Path) -> list[tuple[float, Path]]:
    """When each was written; other threads may remove some meanwhile."""
    found = []
    for path in _inside(folder) if _is_own(folder) else ():
        with suppress(FileNotFoundError):
            if path.suffix != ".jpg":
                found.append((path.lstat().st_mtime, path))
    return found


def _remove_upload(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.with_suffix(".jpg").unlink(missing_ok=True)
