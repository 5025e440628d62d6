"""Finished images on the disk. They are the record that counts: each tells which job it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..files import whole_file
from ..generation.image_input import open_image
from ..pipelines.decoding.image_files import METADATA_KEY
from .jobs import Job

# The last bytes of a whole PNG (https://www.w3.org/TR/png-3/#11IEND), without the checksum.
_PNG_END = b"\0\0\0\0IEND"


def finished(folder: Path, job: Job) -> dict[str, Any] | None:
    """The settings that stand in a job's image; None if it is not there, or another's.

    Raises:
        RequestError: a file has the image's name that this program did not write.
    """
    path = folder / job.image
    if not path.exists():
        return None
    try:
        with open_image(path) as image:
            settings = json.loads(image.info.get(METADATA_KEY, "{}"))
        with path.open("rb") as file:
            file.seek(-12, 2)
            whole = file.read(8) == _PNG_END
    except (RequestError, OSError, ValueError, SyntaxError):
        settings = {}
    if not isinstance(settings, dict) or "job" not in settings:
        raise RequestError(
            f"there is a {path} that no render wrote; move it away, or give the job another id."
        )
    return settings if whole and settings["job"] == job.identity else None


def write_sidecar(folder: Path, job: Job, settings: dict[str, Any], **result: Any) -> None:
    """Write what stands in the image, and how it went, beside it.

    Raises:
        OSError: it cannot be written.
    """
    text = json.dumps(settings | result, indent=1, ensure_ascii=False)
    with whole_file(folder / job.sidecar) as file:
        file.write(text.encode())


def complete_sidecar(folder: Path, job: Job, settings: dict[str, Any]) -> dict[str, Any]:
    """Write the sidecar of a finished image if a killed process did not come to it.

    Returns:
        seconds (of the whole generation), if it is known.

    Raises:
        OSError: it cannot be written.
    """
    try:
        there = json.loads((folder / job.sidecar).read_bytes())
        if there["job"] == job.identity:
            return {"seconds": there["seconds"]["total"]} if "seconds" in there else {}
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none, or another's
    write_sidecar(folder, job, settings)
    return {}
