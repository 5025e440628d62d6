"""Uploaded images: bounded by what their header says, then kept as plain RGB."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from ..errors import RequestError
from ..files import whole_file
from ..generation.image_input import load_pixels, open_image
from ..pipelines.decoding.colours import to_srgb
from .settings import MAX_UPLOAD_PIXELS

# Those whose decoders take memory by the size the header tells, and run nothing.
FORMATS = ("PNG", "JPEG", "WEBP")

_WHO = "The file"


def keep_upload(path: Path) -> tuple[int, int]:
    """Make an uploaded file a PNG in sRGB, turned as its camera says, on white where transparent.

    Returns:
        Its width and height in pixels.

    Raises:
        RequestError: it is not one of `FORMATS`, is damaged, or has more than `MAX_UPLOAD_PIXELS`.
    """
    with open_image(path, _WHO, FORMATS) as opened:
        width, height = opened.size
        if width * height > MAX_UPLOAD_PIXELS:
            raise RequestError(
                f"The image has {width} × {height} pixels; at most "
                f"{MAX_UPLOAD_PIXELS // 10**6} million are read."
            )
        load_pixels(opened, _WHO)
        try:
            image = to_srgb(opened, _WHO)
        except ValueError as error:
            raise RequestError(str(error)) from error
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    with whole_file(path) as file:
        image.save(file, "PNG", compress_level=1)
    return image.size
