"""What files say of their colours where Pillow does not look."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from PIL import Image

# It stands before the pixels.
_HEAD = 2**20
# Boxes of JPEG 2000 and HEIF that have boxes in them, and where those begin.
_CONTAINERS = {b"jp2h": 0, b"meta": 4, b"iprp": 0, b"ipco": 0}


def note_colours(image: Image.Image, file: BinaryIO) -> None:
    """Complete an image's `info` by what its file says: "icc_profile", and "cicp" of H.273.

    The latter is the numbers of primaries and curve: PNG's chunk of that name
    (https://www.w3.org/TR/png-3/#cICP-chunk), and AVIF's and HEIC's box (ISO 14496-12, 12.1.5).
    """
    if image.info.get("icc_profile"):
        return
    if image.format == "HEIF":  # whose plugin has looked
        found = image.info.get("nclx_profile")
        if found:
            image.info["cicp"] = found["color_primaries"], found["transfer_characteristics"]
        return
    if image.format not in ("PNG", "AVIF", "JPEG2000"):
        return
    here = file.tell()
    file.seek(0)
    head = file.read(_HEAD)
    file.seek(here)
    if image.format == "PNG":
        numbers = next((data for kind, data in _chunks(head) if kind == b"cICP"), b"")
        if len(numbers) == 4:
            image.info["cicp"] = numbers[0], numbers[1]
        return
    for box in _colour_boxes(head):
        if image.format == "JPEG2000" and box[:1] in (b"\2", b"\3"):
            image.info["icc_profile"] = box[3:]
            return
        if image.format == "AVIF" and box[:4] == b"nclx":
            image.info["cicp"] = int.from_bytes(box[4:6]), int.from_bytes(box[6:8])
            return


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Those of a PNG before its pixels."""
    at = 8
    while at + 8 <= len(data) and data[at + 4 : at + 8] != b"IDAT":
        length = int.from_bytes(data[at : at + 4])
        yield data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        at += 12 + length


def _colour_boxes(data: bytes) -> Iterator[bytes]:
    at = 0
    while at + 8 <= len(data):
        size, kind, start = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8], at + 8
        if size == 1:
            size, start = int.from_bytes(data[at + 8 : at + 16]), at + 16
        end = at + size if size else len(data)
        if end < start:
            return
        if kind == b"colr":
            yield data[start:end]
        elif kind in _CONTAINERS:
            yield from _colour_boxes(data[start + _CONTAINERS[kind] : end])
        at = end
