"""Images written strip by strip, as they are decoded, in memory that does not grow with them."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np
import png
import tifffile
import torch

from clear_dit.files import whole_file, write_new

from .colours import srgb_profile

# The key under which the settings stand in a PNG's text, as JSON.
METADATA_KEY = "clear_dit"
# What a PNG in sRGB says of its colours: perceptual, the intent of pictures.
SRGB_CHUNK = (b"sRGB", b"\0")
# What `save_rows` writes.
IMAGE_SUFFIXES = (".png", ".tif", ".tiff")

# Rows that are rounded at once.
_ROWS_AT_ONCE = 64
# The number of a PNG's filter by the row above.
_UP_FILTER = 2
# Side of the tiles in a TIFF, in pixels: viewers then read only what they show.
_TIFF_TILE = 256
# A TIFF beyond this many bytes of pixels needs 64-bit offsets.
_CLASSIC_TIFF = 2**32 - 2**25


def to_bytes(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels in [-1, 1] as diffusers' VaeImageProcessor rounds them: uint8, same shape, on the CPU.

    What lies outside is clamped.
    """
    unit = (pixels * 0.5 + 0.5).clamp(0, 1).cpu().float()
    return (unit * 255).round().to(torch.uint8)


def save_rows(
    strips: Iterable[torch.Tensor],
    path: Path,
    *,
    height: int,
    width: int,
    settings: Mapping[str, object],
    overwrite: bool = True,
) -> Path:
    """Write an image from its strips, whole or not at all (see `whole_file`).

    Args:
        strips: (3, rows, width) in [-1, 1] from top to bottom, such as `decode_rows` gives, or
            (4, rows, width) with alpha; any numbers of rows that add up to `height`.
        path: a .png, .tif or .tiff: 8 bits, sRGB and saying so, compressed without loss; a TIFF
            beyond 4 GB becomes a BigTIFF.
        height, width: in pixels.
        settings: stand in the image's text as JSON; `read_settings` of
            `clear_dit.generation.image_output` finds them.
        overwrite: replace a file of that name; False for another name then (see `write_new`).

    Returns:
        The file.

    Raises:
        ValueError: another kind of file, strips of another size, or pixels that are not finite.
        OSError: the disk is full or the folder is gone; nothing is left behind.
    """
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise ValueError(
            f"save_rows: the file must be {', '.join(IMAGE_SUFFIXES)}, got {str(path)!r}."
        )
    write = image_writer(
        _checked(strips, height, width), path.suffix, height=height, width=width, settings=settings
    )

    if not overwrite:
        return write_new(path, write)
    with whole_file(path) as file:
        write(file)
    return path


def image_writer(
    rows: Iterable[np.ndarray],
    suffix: str,
    *,
    height: int,
    width: int,
    settings: Mapping[str, object],
) -> Callable[[BinaryIO], None]:
    """What writes an image of 8 bits in sRGB into a file, as `save_rows` does.

    Args:
        rows: uint8 (rows, width, 3 or 4) from top to bottom, `height` rows in all.
        suffix: of its format, one of `IMAGE_SUFFIXES`.
        height, width, settings: see `save_rows`.
    """
    write = _write_png if suffix.lower() == ".png" else _write_tiff
    return lambda file: write(file, iter(rows), height, width, settings)


def _checked(strips: Iterable[torch.Tensor], height: int, width: int) -> Iterator[np.ndarray]:
    """Strips as uint8 (rows, width, 3 or 4); refuses another size once it is known."""
    done = channels = 0
    for strip in strips:
        channels = channels or (4 if len(strip) == 4 else 3)
        done += strip.shape[1]
        if strip.shape != (channels, strip.shape[1], width) or done > height:
            break
        if not strip.isfinite().all():
            raise ValueError("save_rows: the image is not finite (NaN or infinity in it).")
        for part in strip.split(_ROWS_AT_ONCE, dim=1):
            yield to_bytes(part).permute(1, 2, 0).contiguous().numpy()
    else:
        if done == height:
            return
    raise ValueError(
        f"save_rows: strips of ({channels}, rows, {width}) must add up to {height} rows; the "
        f"last was {tuple(strip.shape)}, up to row {done}."
    )


def _write_png(
    file: BinaryIO,
    strips: Iterator[np.ndarray],
    height: int,
    width: int,
    settings: Mapping[str, object],
) -> None:
    text = json.dumps(settings, ensure_ascii=False)
    png.write_chunks(file, _png_chunks(strips, height, width, text))


def _png_chunks(
    strips: Iterator[np.ndarray], height: int, width: int, text: str
) -> Iterator[tuple[bytes, bytes]]:
    """What a PNG consists of (https://www.w3.org/TR/png-3), for pypng to write.

    Rows are stored as differences to the row above, modulo 256, which its own writer cannot do: a
    image of the demo is 1.5 times as large without.
    """
    channels, strips = _channels(strips)
    # 8 bits a sample, RGB or with alpha, deflate, filters by row, not interlaced.
    yield b"IHDR", struct.pack("!2I5B", width, height, 8, 6 if channels == 4 else 2, 0, 0, 0)
    yield SRGB_CHUNK
    # Not compressed, no language, no translated keyword.
    yield b"iTXt", f"{METADATA_KEY}\0\0\0\0\0{text}".encode()
    # 8% larger than at the default level (an image of the demo), in less than a third of the time.
    compressor = zlib.compressobj(level=4)
    above = np.zeros((1, channels * width), np.uint8)
    for strip in strips:
        rows = strip.reshape(len(strip), -1)
        filtered = np.full((len(rows), 1 + channels * width), _UP_FILTER, np.uint8)
        np.subtract(rows, np.concatenate([above, rows[:-1]]), out=filtered[:, 1:])
        above = rows[-1:]
        if data := compressor.compress(filtered.data):
            yield b"IDAT", data
    yield b"IDAT", compressor.flush()
    yield b"IEND", b""


def _write_tiff(
    file: BinaryIO,
    strips: Iterator[np.ndarray],
    height: int,
    width: int,
    settings: Mapping[str, object],
) -> None:
    channels, strips = _channels(strips)
    tifffile.imwrite(
        file,
        _tiles(strips),
        shape=(height, width, channels),
        dtype=np.uint8,
        photometric="rgb",
        extrasamples=["unassalpha"] if channels == 4 else None,
        tile=(_TIFF_TILE, _TIFF_TILE),
        compression="zlib",
        predictor=True,
        bigtiff=channels * height * width > _CLASSIC_TIFF,
        description=json.dumps(settings),
        metadata=None,
        software=METADATA_KEY,
        iccprofile=srgb_profile(),
        maxworkers=1,
    )


def _channels(strips: Iterator[np.ndarray]) -> tuple[int, Iterator[np.ndarray]]:
    """How many channels strips have, and all of them again."""
    first = next(strips)
    return first.shape[2], chain([first], strips)


def _tiles(strips: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The tiles of a TIFF in raster order; those at the right and lower border may be smaller."""
    for band in _regrouped(strips, _TIFF_TILE):
        for left in range(0, band.shape[1], _TIFF_TILE):
            yield np.ascontiguousarray(band[:, left : left + _TIFF_TILE])


def _regrouped(strips: Iterator[np.ndarray], rows: int) -> Iterator[np.ndarray]:
    """The same rows in strips of `rows`; the last may have fewer."""
    waiting: np.ndarray | None = None
    for strip in strips:
        waiting = strip if waiting is None else np.concatenate([waiting, strip])
        while len(waiting) >= rows:
            yield waiting[:rows]
            waiting = waiting[rows:]
    if waiting is not None and len(waiting):
        yield waiting
