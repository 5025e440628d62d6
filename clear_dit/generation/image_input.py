"""Opening images that users name, however large or broken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import RequestError
from .checks import MAX_SIDE


def read_image(path: Path) -> Image.Image:
    """An image with its pixels, turned as its camera says.

    Raises:
        RequestError: see `open_image`; or it is damaged.
    """
    with open_image(path) as image:
        try:
            return ImageOps.exif_transpose(image)
        except (OSError, SyntaxError, ValueError) as error:
            raise RequestError(f"{path} is damaged or cut off ({error}).") from error


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """An image whose pixels are not read yet.

    Raises:
        RequestError: it is not one, or has more than `MAX_SIDE` pixels a side.
    """
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None  # the size is checked below, before a pixel is read
    try:
        with Image.open(path) as image:
            if max(image.size) > MAX_SIDE:
                width, height = image.size
                raise RequestError(
                    f"{path} has {width} x {height} pixels; at most {MAX_SIDE} a side are read."
                )
            yield image
    except UnidentifiedImageError as error:
        raise RequestError(f"{path} is not an image.") from error
    except OSError as error:
        raise RequestError(f"{path} cannot be read ({error.strerror or error}).") from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit
