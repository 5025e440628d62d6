"""Opening images that users name, however large or broken: the one way files become pixels."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageFile, ImageOps
from PIL.TiffImagePlugin import TiffImageFile

from ..errors import RequestError, first_line
from ..pipelines.decoding.colours import to_rgb
from .checks import MAX_SIDE
from .image_colours import note_colours
from .image_kinds import is_heif, kind_of

# What Pillow's plugins raise for files that are not theirs, and when files are bent or cut.
_NOT_THEIRS = (SyntaxError, IndexError, TypeError, KeyError, struct.error)
_BENT = (OSError, ValueError, EOFError, RuntimeError)
_DAMAGED = (*_NOT_THEIRS, *_BENT, Image.DecompressionBombError)
# These hold several images, and the first is the one that viewers show.
_FIRST_COUNTS = ("MPO", "PSD", "HEIF")
# Drawings and films that Pillow knows by sight alone, or by running another program.
_NO_PIXELS = ("EPS", "MPEG")
# Tags of a TIFF.
_TIFF_SUBFILE_TYPE, _BITS, _PLANAR, _SUB_IFDS = 254, 258, 284, 330
# A page that is another one made small, or its mask.
_SMALL = 1
_TIFF_BESIDES = _SMALL | 4
_HEAD = 256


def read_image(path: Path) -> Image.Image:
    """An image with its pixels in sRGB, of mode RGB, turned as its camera says.

    Raises:
        RequestError: see `open_image` and `load_pixels`; or it is not opaque everywhere, or has
            over 8 bits a channel.
    """
    name = str(path)
    with open_image(path) as image:
        load_pixels(image, name)
        try:
            return to_rgb(image, name)
        except ValueError as error:
            raise RequestError(str(error)) from error


def load_pixels(image: ImageFile.ImageFile, name: str) -> None:
    """Read the pixels of an image that `open_image` gave, and turn it as its camera says.

    Raises:
        RequestError: see `load_unturned`.
    """
    load_unturned(image, name)
    with suppress(*_DAMAGED):  # what a camera says may be bent where the pixels are not
        ImageOps.exif_transpose(image, in_place=True)


def load_unturned(image: ImageFile.ImageFile, name: str) -> None:
    """Read the pixels of an image that `open_image` gave, as they stand in the file.

    Raises:
        RequestError: there are several images in the file, or it is damaged, or a TIFF that
            Pillow would read wrongly, or of which it would read a small copy.
    """
    try:
        if _has_several(image):
            raise RequestError(
                f"{name} holds several images ({image.format}, animated or of many pages); save "
                "the one that is meant alone."
            )
        if isinstance(image, TiffImageFile):
            if image.tag_v2.get(_TIFF_SUBFILE_TYPE, 0) & _SMALL and (
                image.is_animated or _SUB_IFDS in image.tag_v2
            ):
                raise RequestError(
                    f"{name} begins with a small copy of its image, as camera raw files do; save "
                    "the image itself as a PNG or JPEG."
                )
            if image.tag_v2.get(_PLANAR, 1) != 1 and max(image.tag_v2.get(_BITS, (1,))) > 8:
                raise RequestError(  # Pillow takes the planes for pixels
                    f"{name} is a TIFF of over 8 bits a channel with its channels apart; save it "
                    "as a PNG or JPEG of 8 bits."
                )
            # Its plugin would hold the size against Pillow's own bound, a global, when it takes
            # this memory. Turned images have another size than their tiles.
            image.im = Image.new(image.mode, getattr(image, "_tile_size", image.size)).im
        image.load()
    except RequestError:
        raise
    except _DAMAGED as error:
        raise RequestError(f"{name} is damaged or cut off ({first_line(error)}).") from error


@contextmanager
def open_image(
    path: Path, name: str | None = None, formats: Sequence[str] | None = None
) -> Iterator[ImageFile.ImageFile]:
    """An image whose pixels are not read yet.

    Pillow's bound on pixels is a global that other threads read, so it is left as it is: the size
    is checked here, before memory is taken.

    Args:
        path: of the file.
        name: of the file in errors; None for its path.
        formats: Pillow's names of those that are taken; None for all it knows, and HEIC.

    Raises:
        RequestError: it cannot be read, is not an image, is of a kind that is not read (which is
            named, with what to do), or has more than `MAX_SIDE` pixels a side.
    """
    name = name or str(path)
    try:
        file = path.open("rb")
    except (OSError, ValueError) as error:  # the latter of a path with a zero byte
        reason = getattr(error, "strerror", None) or first_line(error)
        raise RequestError(f"{name} cannot be read ({reason}).") from error
    with file:
        try:
            head = file.read(_HEAD)
            by_heif = formats is None and is_heif(head)
            image = _heif(file, name) if by_heif else _identified(file, path, head, formats)
        except _BENT as error:
            if isinstance(error, RequestError):
                raise
            raise RequestError(f"{name} cannot be read ({first_line(error)}).") from error
        if image is None:
            kind = kind_of(head)
            if formats is None and kind == "AVIF" and not _reads_avif(head):
                raise RequestError(
                    f"{name} is an AVIF image, which Pillow reads from 11.3 on: pip install -U "
                    "pillow; or save it as a PNG."
                )
            raise _not_read(kind, name)
        with image:
            if image.format in _NO_PIXELS or isinstance(image, ImageFile.StubImageFile):
                raise _not_read(image.format, name)
            if max(image.size) > MAX_SIDE:
                width, height = image.size
                raise RequestError(
                    f"{name} has {width} x {height} pixels; at most {MAX_SIDE} a side are read."
                )
            note_colours(image, file)
            yield image


def _identified(
    file: BinaryIO, path: Path, head: bytes, formats: Sequence[str] | None
) -> ImageFile.ImageFile | None:
    """As `Image.open` finds out what a file is, without its look at the size."""
    Image.init()
    for name in Image.ID if formats is None else formats:
        factory, accept = Image.OPEN[name]
        try:
            found = accept is None or accept(head[:16])
            if found and not isinstance(found, str):  # a text: Pillow was built without it
                file.seek(0)
                return factory(file, str(path))
        except _NOT_THEIRS:
            continue
    return None


def _heif(file: BinaryIO, name: str) -> ImageFile.ImageFile | None:
    try:
        from pillow_heif import HeifImageFile
    except ImportError as error:
        raise RequestError(
            f"{name} is a HEIC image, which pillow-heif reads: pip install 'clear-dit[heif]'; or "
            "save it as a JPEG."
        ) from error
    file.seek(0)
    try:
        return HeifImageFile(file)
    except SyntaxError as error:
        raise RequestError(
            f"{name} is a HEIC image that is damaged or cut off ({first_line(error)})."
        ) from error


def _reads_avif(head: bytes) -> bool:
    _, accept = Image.OPEN.get("AVIF", (None, None))
    return accept is not None and accept(head[:16]) is True


def _not_read(kind: str | None, name: str) -> RequestError:
    if kind is None:
        return RequestError(f"{name} is not an image.")
    return RequestError(
        f"{name} is of the kind {kind}, which is not read here in this variant, or damaged; save "
        "it as a PNG or JPEG of 8 bits."
    )


def _has_several(image: ImageFile.ImageFile) -> bool:
    """Whether a file has more than one image, each of its own."""
    if image.format in _FIRST_COUNTS or not getattr(image, "is_animated", False):
        return False
    if not isinstance(image, TiffImageFile):
        return True
    pages = 0
    try:
        for page in count():
            image.seek(page)
            pages += not image.tag_v2.get(_TIFF_SUBFILE_TYPE, 0) & _TIFF_BESIDES
    except EOFError:
        image.seek(0)
    return pages > 1
