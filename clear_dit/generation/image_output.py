"""What stands in a finished image besides its pixels: the settings it was made with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import TiffImageFile

from ..files import whole_file
from ..pipelines.decoding.image_files import METADATA_KEY, SRGB_CHUNK
from .image_input import open_image

# Tags of a TIFF: the settings stand in the description of one whose software is METADATA_KEY.
_IMAGE_DESCRIPTION, _SOFTWARE = 270, 305


def save_png(image: Image.Image, path: Path, settings: Mapping[str, object]) -> None:
    """Write a PNG in sRGB with its settings inside, by `whole_file`.

    Raises:
        OSError: the disk is full or the folder is gone; nothing is left behind.
    """
    info = PngInfo()
    info.add(*SRGB_CHUNK)
    info.add_itxt(METADATA_KEY, json.dumps(settings, ensure_ascii=False))
    with whole_file(path) as file:
        image.save(file, format="PNG", pnginfo=info)


def settings_exif(settings: Mapping[str, object]) -> Image.Exif:
    """Settings as EXIF has them, for a JPEG or WebP; in the tags that a TIFF has them in."""
    exif = Image.Exif()
    # ASCII is what EXIF's texts consist of.
    exif[_IMAGE_DESCRIPTION], exif[_SOFTWARE] = json.dumps(settings), METADATA_KEY
    return exif


def read_settings(path: Path, most: int | None = None) -> dict[str, object]:
    """The settings that this program put into an image; empty if it has none.

    Args:
        path: of the image.
        most: characters that are read; None for all.

    Raises:
        ValueError: they are no JSON, or more.
    """
    with open_image(path) as image:
        if isinstance(image, TiffImageFile):
            text = _described(image.tag_v2)
        elif image.format == "PNG":
            text = image.info.get(METADATA_KEY)
        else:
            text = _described(image.getexif())
    if most is not None and text and len(text) > most:
        raise ValueError(f"read_settings: at most {most} characters are read, got {len(text)}.")
    return json.loads(text or "{}")


def _described(tags: Any) -> Any:
    return tags.get(_IMAGE_DESCRIPTION) if tags.get(_SOFTWARE) == METADATA_KEY else None
