"""Writing a picture whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .errors import RequestError

# The key under which the settings stand in a PNG's text, as JSON.
METADATA_KEY = "clear_dit"


def check_writable(path: Path) -> None:
    """Refuse an output path before any work is done for it.

    Raises:
        RequestError: not a .png, no such folder, a folder in its place, no permission.
    """
    if path.suffix.lower() != ".png":
        raise RequestError(f"--out must end in .png, got {str(path)!r}.")
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


def save_png(image: Image.Image, path: Path, settings: Mapping[str, object]) -> None:
    """Write a PNG with its settings inside: to a temporary file beside `path`, then renamed.

    Raises:
        OSError: the disk is full or the folder is gone; nothing is left behind.
    """
    info = PngInfo()
    info.add_itxt(METADATA_KEY, json.dumps(settings, ensure_ascii=False))
    handle, name = tempfile.mkstemp(prefix=".clear-dit-", suffix=".png", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            image.save(file, format="PNG", pnginfo=info)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_settings(path: Path) -> dict[str, object]:
    """The settings `save_png` put into a picture; empty if it has none."""
    with Image.open(path) as image:
        return json.loads(image.info.get(METADATA_KEY, "{}"))
