"""A pyramid of tiles for a zoomable viewer, made from an image strip by strip.

Deep Zoom's layout (https://openseadragon.github.io/examples/tilesource-dzi/): level n is the
image halved so often that it has at most 2^n pixels a side, cut into squares without overlap,
LEVEL/COLUMN_ROW.jpg.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import png
from PIL import Image

from ..pipelines.decoding.colours import srgb_profile

# Side of a tile, in pixels.
TILE = 512
_QUALITY = 90
# Bytes that are decompressed at once.
_BLOCK = 2**22
_UP_FILTER = 2


def write_tiles(path: Path, folder: Path) -> int:
    """Cut a PNG of `save_rows` into tiles.

    Holds some strips of at most `TILE` rows and 4 MiB besides, however large the image is.

    Args:
        path: of the PNG.
        folder: to be made.

    Returns:
        The highest level: that of the whole image's pixels.

    Raises:
        ValueError: another kind of PNG.
        OSError: it cannot be read, or a tile cannot be written.
    """
    with path.open("rb") as file:
        reader = png.Reader(file=file)
        reader.preamble()
        top = (max(reader.width, reader.height) - 1).bit_length()
        level = _Level(folder, top)
        for strip in _rows(reader):
            level.add(strip)
        level.end()
    return top


def image_rows(path: Path) -> Iterator[np.ndarray]:
    """The pixels of a PNG of `save_rows`, strip by strip: uint8 (rows, width, 3).

    Raises:
        ValueError: another kind of PNG.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        reader = png.Reader(file=file)
        reader.preamble()
        yield from _rows(reader)


# By PNG's colour type; alpha, which Qwen-Image 2.1 makes, is left out of tiles.
CHANNELS = {2: 3, 6: 4}


def _rows(reader: png.Reader) -> Iterator[np.ndarray]:
    """The rows of a PNG that `save_rows` wrote: uint8 (rows, width, 3).

    pypng's own reader undoes filters byte by byte in Python: an hour for 8192 x 8192 pixels.
    """
    if reader.color_type not in CHANNELS or (reader.bitdepth, reader.interlace) != (8, 0):
        raise ValueError("write_tiles: must be a PNG of 8 bits, RGB or RGBA, not interlaced.")
    channels = CHANNELS[reader.color_type]
    length = 1 + channels * reader.width
    above = np.zeros((1, length - 1), np.uint8)
    rest = b""
    for block in _decompressed(data for kind, data in reader.chunks() if kind == b"IDAT"):
        rest += block
        whole = len(rest) // length * length
        if not whole:
            continue
        rows = np.frombuffer(rest[:whole], np.uint8).reshape(-1, length)
        rest = rest[whole:]
        if (rows[:, 0] != _UP_FILTER).any():
            raise ValueError("write_tiles: must be a PNG written by save_rows (filter up).")
        summed = np.add.accumulate(np.concatenate([above, rows[:, 1:]]), axis=0, dtype=np.uint8)
        above = summed[-1:]
        yield summed[1:].reshape(-1, reader.width, channels)[..., :3]


def _decompressed(chunks: Iterable[bytes]) -> Iterator[bytes]:
    inflate = zlib.decompressobj()
    for data in chunks:
        while data:
            yield inflate.decompress(data, _BLOCK)
            data = inflate.unconsumed_tail
    yield inflate.flush()


class _Level:
    """A level and all below: rows that wait to fill a row of tiles, and one for its neighbour."""

    def __init__(self, root: Path, number: int) -> None:
        self.folder = root / str(number)
        self.folder.mkdir(parents=True)
        self.below = _Level(root, number - 1) if number else None
        self.waiting: list[np.ndarray] = []
        self.tile_row = 0
        self.single: np.ndarray | None = None

    def add(self, rows: np.ndarray) -> None:
        """Take rows, (rows, width, 3), and write the tiles they complete."""
        self.waiting.append(rows)
        if sum(map(len, self.waiting)) >= TILE:
            strip = np.concatenate(self.waiting)
            whole = len(strip) // TILE * TILE
            for top in range(0, whole, TILE):
                self._write(strip[top : top + TILE])
            self.waiting = [strip[whole:].copy()]
        if self.below is not None:
            if self.single is not None:
                rows = np.concatenate([self.single, rows])
            even = len(rows) // 2 * 2
            self.single = rows[even:].copy() if len(rows) % 2 else None
            if even:
                self.below.add(_halved(rows[:even]))

    def end(self) -> None:
        """Write what is left: the image ends here."""
        strip = np.concatenate(self.waiting)
        if len(strip):
            self._write(strip)
        if self.below is not None:
            if self.single is not None:
                self.below.add(_halved(np.concatenate([self.single, self.single])))
            self.below.end()

    def _write(self, strip: np.ndarray) -> None:
        for column, left in enumerate(range(0, strip.shape[1], TILE)):
            tile = Image.fromarray(np.ascontiguousarray(strip[:, left : left + TILE]))
            path = self.folder / f"{column}_{self.tile_row}.jpg"
            tile.save(path, quality=_QUALITY, icc_profile=srgb_profile())
        self.tile_row += 1


def _halved(rows: np.ndarray) -> np.ndarray:
    """The mean of 2 x 2 pixels; a last column without a neighbour counts twice."""
    if rows.shape[1] % 2:
        rows = np.concatenate([rows, rows[:, -1:]], axis=1)
    wide = rows.astype(np.uint16)
    sums = wide[0::2, 0::2] + wide[0::2, 1::2] + wide[1::2, 0::2] + wide[1::2, 1::2]
    return ((sums + 2) // 4).astype(np.uint8)
