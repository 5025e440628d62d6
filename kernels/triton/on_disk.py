"""What a machine found out about the kernels, kept beside Triton's cache."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import triton

logger: logging.Logger = logging.getLogger(__name__)


@functools.cache
def _source() -> str:
    """Of the kernels: what was found out is void once they change."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def name(*about: Any) -> str:
    """The name of a finding: what it is about, and the versions that it holds for."""
    return json.dumps([_source(), triton.__version__, torch.__version__, _driver(), *about])


@functools.cache
def _driver() -> str:
    """NVIDIA's, where it tells."""
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return ""


class Kept:
    """Findings by name, in a JSON file. One that cannot be read or written is an empty one.

    Args:
        file: its name, in the folder of Triton's cache.
    """

    def __init__(self, file: str) -> None:
        self._file = file
        self._known: dict[str, Any] | None = None

    @property
    def path(self) -> Path:
        """Where the file is, or would be."""
        return Path(triton.knobs.cache.dir) / self._file

    def get(self, name: str) -> Any:
        """A finding of this machine; None if there is none."""
        if self._known is None:
            self._known = self._read()
        return self._known.get(name)

    def keep(self, name: str, finding: Any) -> None:
        """Write one more, beside what is there."""
        self._known = (self._known or {}) | {name: finding}
        part = self.path.with_suffix(f".{uuid4().hex}.part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(self._read() | {name: finding}, indent=0))
            part.replace(self.path)
        except OSError as error:
            logger.info("what was found out about kernels is not kept: %s", error)

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}
