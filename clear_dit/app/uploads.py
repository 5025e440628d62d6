"""Uploaded images: bounded by what their header says, then kept as plain RGB."""

from __future__ import annotations

import warnings
from pathlib import Path

from PIL import Image, ImageOps

from ..errors import RequestError
from ..files import whole_file
from .settings import MAX_UPLOAD_PIXELS

# Those whose decoders take memory by the size the header tells, and run nothing.
FORMATS = ("PNG", "JPEG", "WEBP")


def keep_upload(path: Path) -> tuple[int, int]:
    """Make an uploaded file a PNG in RGB, turned as its camera says, on white where transparent.

    Returns:
        Its width and height in pixels.

    Raises:
        RequestError: it is not one of `FORMATS`, is damaged, or has more than `MAX_UPLOAD_PIXELS`.
    """
    try:
        with warnings.catch_warnings():
            # Of Pillow's own limit, which is higher than this one.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as opened:
                width, height = opened.size
                if width * height > MAX_UPLOAD_PIXELS:
                    raise RequestError(
                        f"The image has {width} × {height} pixels; at most "
                        f"{MAX_UPLOAD_PIXELS // 10**6} million are read."
                    )
                image = ImageOps.exif_transpose(opened)
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        image = image.convert("RGB")
    except Image.DecompressionBombError as error:
        raise RequestError("The image has too many pixels.") from error
    except RequestError:
        raise
    except (OSError, SyntaxError, ValueError) as error:
        raise RequestError(
            "This is not an image that can be read; take a PNG, JPEG or WebP."
        ) from error
    with whole_file(path) as file:
        image.save(file, "PNG", compress_level=1)
    return image.size
