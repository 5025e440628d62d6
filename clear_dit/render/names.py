"""Names of images: those of jobs' ids, or made from the prompt; never a path."""

from __future__ import annotations

import re

from ..errors import RequestError

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# Names that Windows keeps for devices, with any suffix.
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_SLUG_LENGTH = 40


def check_id(value: str) -> str:
    """An id that can be the name of a file on any system.

    Raises:
        RequestError: it cannot.
    """
    if not _ID.fullmatch(value) or value.endswith(".") or _DEVICES.fullmatch(value):
        raise RequestError(
            f"an id names the image's file: up to 100 of A-Z a-z 0-9 . _ - that begin with a "
            f"letter or digit, do not end with a dot and name no device (con, nul); got "
            f"{value[:100]!r}."
        )
    return value


def name_from(prompt: str, identity: str) -> str:
    """The name of a job without an id: readable, and its own by the job's identity."""
    words = re.findall(r"[a-z0-9]+", prompt.lower())
    slug = ""
    for word in words:
        if len(slug) + len(word) > _SLUG_LENGTH:
            break
        slug += f"{word}-"
    return f"{slug or 'image-'}{identity[:12]}"
