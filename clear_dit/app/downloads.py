"""Finished images in other formats, and all of them in one archive."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import RequestError
from ..files import whole_file
from ..generation.image_output import read_settings, settings_exif
from ..pipelines.decoding.colours import srgb_profile
from ..pipelines.decoding.image_files import image_writer
from .store import Store
from .tiles import image_rows

# Pillow's options by suffix; a TIFF is written strip by strip.
FORMATS: dict[str, dict[str, Any]] = {
    "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    "webp": {"format": "WEBP", "quality": 95},
    "tif": {},
}
# Of a JPEG or WebP, which are made from the decoded whole.
MAX_PIXELS = 8192 * 8192
_BLOCK = 2**20
_MAX_NAME = 60


def file_name(record: Mapping[str, Any], which: str, kind: str) -> str:
    """What a file of a job is called where it is saved: by prompt and seed; no two are the same.

    Args:
        record: of the job.
        which: "clear" or "full".
        kind: the file's suffix, without a point.
    """
    entry = record["entry"]
    words = re.sub(r"[\W_]+", "-", str(entry["prompt"]).lower())[:_MAX_NAME].strip("-")
    number = re.sub(r"[\W_]", "", record["id"])[:6]
    full = "-full" if which == "full" else ""
    return f"{words or 'image'}-{entry['seed']}-{number}{full}.{kind}"


def converted(path: Path, kind: str, decoding: Callable[[], AbstractContextManager[None]]) -> Path:
    """A PNG of `save_rows` in another format, with its settings inside; kept beside it.

    Args:
        path: of the PNG.
        kind: one of `FORMATS`.
        decoding: held while the whole image is in memory.

    Raises:
        RequestError: it is too large for that format.
        OSError: the disk is full.
    """
    found = path.with_suffix(f".{kind}")
    with decoding():
        if found.is_file() and not found.is_symlink():
            return found
        settings = read_settings(path)
        with Image.open(path) as image:
            width, height = image.size
            if kind == "tif":
                rows = image_rows(path)
                size = {"height": height, "width": width}
                with whole_file(found) as file:
                    image_writer(rows, ".tif", **size, settings=settings)(file)
                return found
            if width * height > MAX_PIXELS:
                raise RequestError(
                    f"The image has {width} × {height} pixels; as {FORMATS[kind]['format']} at "
                    f"most {MAX_PIXELS:,} are written: take the PNG or TIFF."
                )
            plain = image.convert("RGB")
            with whole_file(found) as file:
                exif = settings_exif(settings)
                plain.save(file, **FORMATS[kind], icc_profile=srgb_profile(), exif=exif)
    return found


def zipped(store: Store, owner: str) -> Iterator[bytes]:
    """A zip of all PNGs of an owner, the newest first, without holding it."""
    sink = _Sink()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for record in store.history(owner):
            for one in record["images"]:
                path = store.file(owner, record["id"], f"{one['attention']}.png")
                if path is None:
                    continue
                name = file_name(record, one["attention"], "png")
                try:
                    source = path.open("rb")
                except FileNotFoundError:  # deleted meanwhile
                    continue
                with source, archive.open(name, "w", force_zip64=True) as file:
                    while block := source.read(_BLOCK):
                        file.write(block)
                        yield sink.take()
    yield sink.take()


class _Sink(io.RawIOBase):
    """A file that cannot seek, of which what was written is taken away."""

    def __init__(self) -> None:
        super().__init__()
        self._blocks: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._blocks.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        found = b"".join(self._blocks)
        self._blocks.clear()
        return found
