"""What stands in a finished image besides its pixels: the settings it was made with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

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


def read_settings(path: Path) -> dict[str, object]:
    """The settings that `save_png` or `save_rows` put into an image; empty if it has none."""
    with open_image(path) as image:
        if isinstance(image, TiffImageFile):
            software = image.tag_v2.get(_SOFTWARE)
            text = image.tag_v2.get(_IMAGE_DESCRIPTION) if software == METADATA_KEY else None
        else:
            text = image.info.get(METADATA_KEY)
    return json.loads(text or "{}")
