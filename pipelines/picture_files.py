"""Pictures written strip by strip, as they are decoded, in memory that does not grow with them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import png
import tifffile
import torch

from clear_dit.output import METADATA_KEY, whole_file

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
) -> None:
    """Write a picture from its strips, whole or not at all (see `whole_file`).

    Args:
        strips: (3, rows, width) in [-1, 1] from top to bottom, such as `decode_rows` gives; any
            numbers of rows that add up to `height`.
        path: a .png, .tif or .tiff: 8 bits, RGB, compressed without loss; a TIFF beyond 4 GB
            becomes a BigTIFF.
        height, width: in pixels.
        settings: stand in the picture's text as JSON; `clear_dit.output.read_settings` finds them.

    Raises:
        ValueError: another kind of file, or strips of another size.
        OSError: the disk is full or the folder is gone; nothing is left behind.
    """
    writers = {".png": _write_png, ".tif": _write_tiff, ".tiff": _write_tiff}
    if path.suffix.lower() not in writers:
        raise ValueError(f"save_rows: the file must be {', '.join(writers)}, got {str(path)!r}.")
    with whole_file(path) as file:
        rows = _checked(strips, height, width)
        writers[path.suffix.lower()](file, rows, height, width, settings)


def _checked(strips: Iterable[torch.Tensor], height: int, width: int) -> Iterator[np.ndarray]:
    """Strips as uint8 (rows, width, 3); refuses another size once it is known."""
    done = 0
    for strip in strips:
        done += strip.shape[1]
        if strip.shape != (3, strip.shape[1], width) or done > height:
            break
        yield to_bytes(strip).permute(1, 2, 0).contiguous().numpy()
    else:
        if done == height:
            return
    raise ValueError(
        f"save_rows: strips of (3, rows, {width}) must add up to {height} rows; the last was "
        f"{tuple(strip.shape)}, up to row {done}."
    )


class _PngWriter(png.Writer):
    """pypng's writer, with a text beside the picture."""

    def __init__(self, height: int, width: int, text: str) -> None:
        super().__init__(width=width, height=height, greyscale=False, bitdepth=8)
        self._text = text

    def write_preamble(self, outfile: BinaryIO) -> None:
        super().write_preamble(outfile)
        # https://www.w3.org/TR/png-3/#11iTXt: not compressed, no language, no translated keyword.
        text = f"{METADATA_KEY}\0\0\0\0\0{self._text}".encode()
        png.write_chunk(outfile, b"iTXt", text)


def _write_png(
    file: BinaryIO,
    strips: Iterator[np.ndarray],
    height: int,
    width: int,
    settings: Mapping[str, object],
) -> None:
    writer = _PngWriter(height, width, json.dumps(settings, ensure_ascii=False))
    writer.write_packed(file, (row.tobytes() for strip in strips for row in strip))


def _write_tiff(
    file: BinaryIO,
    strips: Iterator[np.ndarray],
    height: int,
    width: int,
    settings: Mapping[str, object],
) -> None:
    tifffile.imwrite(
        file,
        _tiles(strips),
        shape=(height, width, 3),
        dtype=np.uint8,
        photometric="rgb",
        tile=(_TIFF_TILE, _TIFF_TILE),
        compression="zlib",
        predictor=True,
        bigtiff=3 * height * width > _CLASSIC_TIFF,
        description=json.dumps(settings),
        metadata=None,
        software=METADATA_KEY,
        maxworkers=1,
    )


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
