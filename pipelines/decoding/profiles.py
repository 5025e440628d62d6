"""ICC profiles of colours that a file tells in other ways: those of PNG, video and cameras."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import ExifTags, Image

Point = tuple[float, float]  # x and y of a colour

_D65 = (0.3127, 0.329)
_SRGB = ((0.64, 0.33), (0.3, 0.6), (0.15, 0.06))
_ADOBE = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
_ADOBE_GAMMA = 563 / 256
# Red, green and blue by ITU-T H.273, table 2, where they are not sRGB's or not told.
_PRIMARIES = {
    5: ((0.64, 0.33), (0.29, 0.6), (0.15, 0.06)),
    6: ((0.63, 0.34), (0.31, 0.595), (0.155, 0.07)),
    9: ((0.708, 0.292), (0.17, 0.797), (0.131, 0.046)),
    12: ((0.68, 0.32), (0.265, 0.69), (0.15, 0.06)),
}
# Table 3: what is not named here is shown as sRGB's; those of HDR have no place in 8 bits.
_GAMMAS = {4: 2.2, 5: 2.8, 8: 1.0}
_HDR = {16: "PQ", 18: "HLG"}
# As libpng: files that differ by less mean sRGB.
_SAME_POINT, _SAME_GAMMA = 0.01, 0.05

# (a x + b)^g from d on, c x below: g, a, b, c, d (ICC.1:2010, 10.16).
_SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
_D50 = np.array([0.9642, 1.0, 0.8249])
_BRADFORD = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)
# What Pillow raises for EXIF data that are bent.
_BENT = (SyntaxError, OSError, LookupError, TypeError, ValueError, struct.error)


def told_profile(image: Image.Image, who: str) -> bytes | None:
    """The profile of an image that has none; None where it is sRGB, or tells nothing.

    Heeded are, the first that is there: H.273's numbers of primaries and curve (in its `info` as
    "cicp"), PNG's sRGB, gamma and chromaticities, and the mark that cameras leave on Adobe RGB.

    Raises:
        ValueError: it is HDR.
    """
    info = image.info
    if "cicp" in info:
        primaries, curve = info["cicp"]
        if curve in _HDR:
            raise ValueError(
                f"{who} is an HDR image ({_HDR[curve]}); save it as one for standard screens "
                "(SDR, sRGB)."
            )
        if primaries in _PRIMARIES or curve in _GAMMAS:
            return _profile(_D65, *_PRIMARIES.get(primaries, _SRGB), gamma=_GAMMAS.get(curve))
        return None
    if "srgb" in info:
        return None
    if "gamma" in info or "chromaticity" in info:
        return _profile_of_png(info.get("gamma"), info.get("chromaticity"))
    return _profile(_D65, *_ADOBE, gamma=_ADOBE_GAMMA) if _is_adobe_rgb(image) else None


def _profile_of_png(gamma: float | None, numbers: Sequence[float] | None) -> bytes | None:
    points = [_D65, *_SRGB]
    if numbers is not None and len(numbers) == 8:
        points = list(zip(numbers[::2], numbers[1::2], strict=True))
    same = np.abs(np.subtract(points, [_D65, *_SRGB])).max() < _SAME_POINT
    # What no eye and no screen has is a mistake.
    if gamma is not None and not 0.1 < gamma < 10:
        gamma = None
    if same and (gamma is None or abs(gamma * 2.2 - 1) < _SAME_GAMMA):
        return None
    try:
        return _profile(*points, gamma=gamma and 1 / gamma)
    except (ZeroDivisionError, np.linalg.LinAlgError, struct.error):
        return None


def _is_adobe_rgb(image: Image.Image) -> bool:
    """By DCF 2.0: no profile, but a mark in EXIF."""
    try:
        exif = image.getexif()
        mark = exif.get_ifd(ExifTags.IFD.Exif) and exif.get_ifd(ExifTags.IFD.Interop)
    except _BENT:
        return False
    return bool(mark) and str(mark.get(ExifTags.Interop.InteropIndex, "")).strip("\0 ") == "R03"


@cache
def _profile(white: Point, red: Point, green: Point, blue: Point, *, gamma: float | None) -> bytes:
    """An ICC profile of three colours.

    Args:
        gamma: None for sRGB's curve.
    """
    xyz = np.array([[x / y, 1, (1 - x - y) / y] for x, y in (white, red, green, blue)]).T
    source, primaries = xyz[:, 0], xyz[:, 1:]
    primaries = primaries * np.linalg.solve(primaries, source)
    cones = (_BRADFORD @ _D50) / (_BRADFORD @ source)
    colourants = np.linalg.solve(_BRADFORD, cones[:, None] * (_BRADFORD @ primaries))
    curve = _SRGB_CURVE if gamma is None else (gamma, 1, 0, 0, 0)
    tags = [_numbers(b"XYZ ", column) for column in colourants.T]
    tags.append(_numbers(b"para", curve, function=3))
    names = (b"rXYZ", b"gXYZ", b"bXYZ", b"rTRC", b"gTRC", b"bTRC")
    at, places, body = 132 + 12 * len(names), [], b""
    for tag in tags:
        places.append((at + len(body), len(tag)))
        body += tag
    table = b"".join(
        struct.pack(">4sII", name, *places[min(index, 3)]) for index, name in enumerate(names)
    )
    header = struct.pack(">I4sI4s4s4s", at + len(body), b"", 0x04200000, b"mntr", b"RGB ", b"XYZ ")
    header = header.ljust(36, b"\0") + b"acsp"
    header = header.ljust(68, b"\0") + _fixed(_D50.tolist())
    return header.ljust(128, b"\0") + struct.pack(">I", len(names)) + table + body


def _numbers(kind: bytes, values: Sequence[float], function: int | None = None) -> bytes:
    head = b"" if function is None else struct.pack(">HH", function, 0)
    return kind + bytes(4) + head + _fixed(values)


def _fixed(values: Sequence[float]) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(65536 * float(value)) for value in values))
