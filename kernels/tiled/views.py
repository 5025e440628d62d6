"""Bands of rows and the tiles in them, as views where that can be.

Below: W columns, Y rows of a band, K rows of its keys, H heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .tiles import MASK_ELEMENTS, TILE_COLUMNS, Band, Columns, tile_bias


class Masks:
    """Groups of tiles of one band with their masks, kept while the next bands look the same."""

    def __init__(
        self, columns: Columns, radius: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._columns = columns
        self._make = lambda band, tiles: tile_bias(band, columns, tiles, radius, dtype, device)
        self._shape: tuple[int, int, int] | None = None
        self._only: torch.Tensor | None = None

    def __call__(self, band: Band) -> Iterator[tuple[range, torch.Tensor | None]]:
        """(tiles, mask) one after the other; a large mask is made anew instead of being kept."""
        rows, _, key_rows = band.shape
        elements = rows * TILE_COLUMNS * key_rows * self._columns.key_length
        count, group = self._columns.count, max(1, MASK_ELEMENTS // elements)
        if group < count:
            for start in range(0, count, group):
                tiles = range(start, min(start + group, count))
                yield tiles, self._make(band, tiles)
            return
        if band.shape != self._shape:
            self._shape, self._only = band.shape, self._make(band, range(count))
        yield range(count), self._only


def heads_first(tokens: torch.Tensor) -> torch.Tensor:
    """(tokens, H, D) -> (1, H, tokens, D), a view."""
    return tokens.transpose(0, 1).unsqueeze(0)


def tokens_first(part: torch.Tensor) -> torch.Tensor:
    """(1, H, tokens, ...) -> (tokens, H, ...), a view."""
    return part.squeeze(0).transpose(0, 1)


def column_major(
    image: torch.Tensor,
    width: int,
    rows: slice,
    dtype: torch.dtype,
    columns: int,
    padding: int = 0,
) -> torch.Tensor:
    """Rows of a raster-order image (tokens, ...) as a copy (columns, rows, ...), zero beyond it."""
    raster = image[rows.start * width : rows.stop * width].unflatten(0, (-1, width))
    make = torch.empty if columns == width else torch.zeros
    band = make(columns, len(raster), *raster.shape[2:], dtype=dtype, device=image.device)
    band[padding : padding + width] = raster.transpose(0, 1)
    return band


def query_tiles(band: torch.Tensor, tiles: range) -> torch.Tensor:
    """Queries of some tiles: (W, Y, H, ...) -> (tiles, H, tile tokens, ...), a view."""
    part = band[tiles.start * TILE_COLUMNS : tiles.stop * TILE_COLUMNS]
    return part.reshape(len(tiles), -1, *band.shape[2:]).transpose(1, 2)


def key_tiles(band: torch.Tensor, columns: Columns, tiles: range) -> torch.Tensor:
    """Keys of some tiles: (W, K, H, D) -> (tiles, H, key tokens, D), overlapping views."""
    _, rows, heads, head_dim = band.shape
    token = heads * head_dim
    step = columns.stride * rows * token
    return band.as_strided(
        (len(tiles), heads, columns.key_length * rows, head_dim),
        (step, head_dim, token, 1),
        band.storage_offset() + tiles.start * step,
    )


def add_key_tiles(band: torch.Tensor, columns: Columns, tiles: range, grad: torch.Tensor) -> None:
    """Adjoint of `key_tiles`: add (tiles, H, key tokens, D) where they overlap."""
    for tile, part in zip(tiles, grad, strict=True):
        start = tile * columns.stride
        target = band[start : start + columns.key_length]
        target += part.transpose(0, 1).reshape(target.shape)
