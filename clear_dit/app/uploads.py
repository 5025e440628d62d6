"""Uploaded images: bounded by what their header says, then kept as plain RGB."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile

from ..errors import RequestError
from ..files import whole_file
from ..generation.image_input import load_unturned, open_image
from ..pipelines.decoding.colours import srgb_profile, to_srgb
from ..pipelines.decoding.image_files import image_writer
from .heads import check_exif, check_jpeg, holds_coefficients
from .settings import MAX_DECODE_BYTES, MAX_UPLOAD_PIXELS

# Those whose decoders take memory by the size the header tells, and run nothing.
FORMATS = ("PNG", "JPEG", "WEBP")
# Rows that are converted at once, and the longer side of the small image, in pixels.
_ROWS = 128
_SMALL = 320
_ORIENTATION = 274
# How to turn; whether rows are the file's columns; and whether they come from its end.
_Turn = tuple[Image.Transpose, bool, bool]
# By what a camera says (EXIF 2.3, 4.6.4).
_TURNS: dict[int, _Turn] = {
    2: (Image.Transpose.FLIP_LEFT_RIGHT, False, False),
    3: (Image.Transpose.ROTATE_180, False, True),
    4: (Image.Transpose.FLIP_TOP_BOTTOM, False, True),
    5: (Image.Transpose.TRANSPOSE, True, False),
    6: (Image.Transpose.ROTATE_270, True, False),
    7: (Image.Transpose.TRANSVERSE, True, True),
    8: (Image.Transpose.ROTATE_90, True, True),
}
_WHO = "The file"


def check_upload(path: Path) -> None:
    """Refuse what takes much memory without being a large image; before anything else reads it.

    Raises:
        RequestError: it is not one of `FORMATS`, or has more metadata than any camera writes.
    """
    check_jpeg(path)
    with open_image(path, _WHO, FORMATS) as opened:
        check_exif(opened.info)


def keep_upload(path: Path) -> tuple[int, int]:
    """Make an uploaded file a PNG in sRGB, turned as its camera says, on white where transparent.

    Beside it, with the suffix .jpg, a small one is written. The decoded image is held once, and
    strips of it.

    Args:
        path: of a file that `check_upload` let pass.

    Returns:
        Its width and height in pixels.

    Raises:
        RequestError: it is not one of `FORMATS`, is damaged, has more than `MAX_UPLOAD_PIXELS`, or
            would take more than `MAX_DECODE_BYTES` to decode; or see `check_exif`.
        OSError: the disk is full.
    """
    with open_image(path, _WHO, FORMATS) as opened:
        _check_size(opened, path)
        load_unturned(opened, _WHO)
        check_exif(opened.info)  # a PNG may have it behind its pixels
        orientation = 1
        with suppress(Exception):  # what a camera says may be bent in any way
            orientation = int(opened.getexif().get(_ORIENTATION, 1))
        turn = _TURNS.get(orientation)
        width, height = opened.size[::-1] if turn and turn[1] else opened.size
        by = max(1, -(-max(opened.size) // _SMALL))
        small: list[np.ndarray] = []
        strips = _strips(opened, turn, height, by, small)
        with whole_file(path) as file:
            image_writer(strips, ".png", height=height, width=width, settings={})(file)
    with whole_file(path.with_suffix(".jpg")) as file:
        profile = srgb_profile()
        Image.fromarray(np.concatenate(small)).save(file, "JPEG", quality=85, icc_profile=profile)
    return width, height


def _check_size(image: ImageFile.ImageFile, path: Path) -> None:
    width, height = image.size
    if width * height > MAX_UPLOAD_PIXELS:
        raise RequestError(
            f"The image has {width} × {height} pixels; at most "
            f"{MAX_UPLOAD_PIXELS // 10**6} million are read."
        )
    by_scans = image.format in ("JPEG", "MPO") and (
        "progressive" in image.info or holds_coefficients(path)
    )
    needs = width * height * _bytes_a_pixel(image, by_scans)
    if needs > MAX_DECODE_BYTES:
        kind = "progressive JPEG" if by_scans else image.format
        raise RequestError(
            f"The image has {width} × {height} pixels, which takes {needs / 2**30:.1f} GiB as "
            f"a {kind}; send it as a PNG, or a smaller one."
        )


def _bytes_a_pixel(image: ImageFile.ImageFile, by_scans: bool) -> int:
    """What decoding takes: Pillow's own 4, and what libraries hold besides."""
    if image.format == "WEBP":
        return 16  # two frames of libwebp, and the bytes they are handed over in
    return 4 + 2 * len(image.getbands()) if by_scans else 4  # all coefficients


def _strips(
    image: Image.Image, turn: _Turn | None, height: int, by: int, small: list[np.ndarray]
) -> Iterator[np.ndarray]:
    """The turned image's rows, RGB; the same, `by` times smaller, are added to `small`."""
    rows = -(-_ROWS // by) * by
    for top in range(0, height, rows):
        strip = _plain(_rows(image, turn, top, min(top + rows, height)))
        small.append(np.asarray(strip.reduce(by)))
        yield np.asarray(strip)


def _rows(image: Image.Image, turn: _Turn | None, top: int, bottom: int) -> Image.Image:
    """Some rows of the turned image."""
    if turn is None:
        return image.crop((0, top, image.width, bottom))
    method, by_columns, from_end = turn
    length = image.width if by_columns else image.height
    first, last = (length - bottom, length - top) if from_end else (top, bottom)
    box = (first, 0, last, image.height) if by_columns else (0, first, image.width, last)
    return image.crop(box).transpose(method)


def _plain(image: Image.Image) -> Image.Image:
    """In sRGB, on white where it is transparent.

    Raises:
        RequestError: see `to_srgb`.
    """
    try:
        image = to_srgb(image, _WHO)
    except ValueError as error:
        raise RequestError(str(error)) from error
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image
