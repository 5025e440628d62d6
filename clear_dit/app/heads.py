"""What uploaded files say before their pixels, where Pillow takes more memory than they have bytes.

EXIF is a list of values by place and length. Pillow copies every one; a file of 1 MB, whose values
all are the same bytes, takes gigabytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import RequestError

# Of EXIF data, and of all values in it: cameras write some 64 KiB.
_MAX_BYTES = 2**20
# TIFF 6.0: the size of a value by its type, and tags that lead to further lists.
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
_LISTS = (0x8769, 0x8825, 0xA005)
_MAX_LISTS = 8
_BIG_TIFF = 43
# Markers of a JPEG (ITU-T T.81, B.1.1.3): those without a length, and some with one.
_BARE = range(0xD0, 0xDA)
_SCAN, _APP1, _APP2 = 0xDA, 0xE1, 0xE2


def check_jpeg(path: Path) -> None:
    """Refuse a JPEG that would take much memory when Pillow opens it; other files are not read.

    Raises:
        RequestError: see `check_exif`.
    """
    with path.open("rb") as file:
        exif = b""
        for marker, data in _segments(file):
            if marker == _APP1 and data.startswith(b"Exif\0\0"):
                exif += data[6:]
            elif marker == _APP2 and data.startswith(b"MPF\0"):
                check_exif({"exif": data[4:]})
    check_exif({"exif": exif})


def holds_coefficients(path: Path) -> bool:
    """Whether a JPEG's decoder holds all of its coefficients: its first scan has not all channels.

    Of a progressive one Pillow tells; this finds those that are not.
    """
    channels = 0
    with path.open("rb") as file:
        for marker, data in _segments(file):
            if marker in (0xC0, 0xC1) and len(data) > 5:
                channels = data[5]
            elif marker == _SCAN:
                return not data or data[0] < channels
    return True


def check_exif(info: Mapping[Any, Any]) -> None:
    """Refuse an image whose EXIF data are more than any camera's, or say to be.

    Args:
        info: of the image that Pillow opened.

    Raises:
        RequestError: they are.
    """
    data = info.get("exif") or b""
    text = info.get("Raw profile type exif")  # ImageMagick's way in a PNG
    if not data and isinstance(text, str):
        data = text.encode()
        if len(data) <= 2 * _MAX_BYTES:
            try:
                data = bytes.fromhex("".join(text.split("\n")[3:]))
            except ValueError:
                data = b""
    if len(data) > _MAX_BYTES or _values(data) > _MAX_BYTES:
        raise RequestError(
            "The file has more EXIF data than any camera writes; save it without them."
        )


def _values(data: bytes) -> int:
    """How many bytes the values of EXIF data have."""
    while data.startswith(b"Exif\0\0"):
        data = data[6:]
    if len(data) < 8:
        return 0
    if _BIG_TIFF in data[2:4]:
        return _MAX_BYTES + 1  # no camera's
    order = ">" if data[:2] == b"MM" else "<"
    lists, total = [struct.unpack_from(order + "I", data, 4)[0]], 0
    for _ in range(_MAX_LISTS):
        if not lists:
            break
        at = lists.pop()
        if at + 2 > len(data):
            continue
        (count,) = struct.unpack_from(order + "H", data, at)
        for place in range(at + 2, min(at + 2 + 12 * count, len(data) - 11), 12):
            tag, kind, length, value = struct.unpack_from(order + "HHII", data, place)
            size = _SIZES.get(kind, 0) * length
            # Of what is not there Pillow reads nothing.
            total += size if size <= 4 or value + size <= len(data) else 0
            if tag in _LISTS:
                lists.append(value)
    return total


def _segments(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Marker and data of each segment up to the first scan, as Pillow finds them."""
    if file.read(3) != b"\xff\xd8\xff":
        return
    while marker := file.read(1):
        number = marker[0]
        if number == 0xFF:
            continue
        if 0 < number < 0xC0:
            return
        if number and number not in _BARE:
            length = int.from_bytes(file.read(2)) - 2
            yield number, file.read(max(0, length))
            if number == _SCAN:
                return
        while (filler := file.read(1)) != b"\xff":
            if not filler:
                return
