"""Bands of rows and the tiles in them, as views where that can be.

Below: W columns, Y rows of a band, K rows of its keys, H heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..opaque import Geometry
from .tiles import MASK_ELEMENTS, TILE_COLUMNS, Band, Columns, tile_bias, tile_columns


class Group(NamedTuple):
    """Tiles that are computed in one call.

    Attributes:
        tiles: which they are.
        mask: (tiles, 1 or H, queries, keys), added to the scores; None where all is seen.
        places: int64 (tiles, keys), of the keys they take in the band's copy; None for rectangles.
    """

    tiles: range
    mask: torch.Tensor | None
    places: torch.Tensor | None = None


class Rectangles:
    """Keys of tiles as the rectangles around them, and masks, kept for bands that look alike."""

    def __init__(self, width: int, radius: int, dtype: torch.dtype, device: torch.device) -> None:
        """dtype: of masks."""
        self._columns = columns = tile_columns(width, radius)
        self._make = lambda band, tiles: tile_bias(band, columns, tiles, radius, dtype, device)
        self._shape: tuple[int, int, int] | None = None
        self._only: torch.Tensor | None = None

    def copy(
        self, image: torch.Tensor, pooled: torch.Tensor, band: Band, dtype: torch.dtype
    ) -> torch.Tensor:
        """What a band reaches of the image (tokens, H, D): (padded columns, rows, H, D)."""
        columns, reach = self._columns, slice(band.key_start, band.key_stop)
        return column_major(image, columns.width, reach, dtype, columns.key_width, columns.padding)

    def add_copy(
        self, image: torch.Tensor, pooled: torch.Tensor, band: Band, copy: torch.Tensor
    ) -> None:
        """Adjoint of `copy`."""
        width, padding = self._columns.width, self._columns.padding
        target = image[band.key_start * width : band.key_stop * width].unflatten(0, (-1, width))
        target += copy[padding : padding + width].transpose(0, 1)

    def groups(self, band: Band) -> Iterator[Group]:
        """Groups of a band's tiles; a large mask is made anew instead of being kept."""
        rows, _, key_rows = band.shape
        elements = rows * TILE_COLUMNS * key_rows * self._columns.key_length
        count, group = self._columns.count, max(1, MASK_ELEMENTS // elements)
        if group < count:
            for start in range(0, count, group):
                tiles = range(start, min(start + group, count))
                yield Group(tiles, self._make(band, tiles))
            return
        if band.shape != self._shape:
            self._shape, self._only = band.shape, self._make(band, range(count))
        yield Group(range(count), self._only)

    def take(self, copy: torch.Tensor, group: Group) -> torch.Tensor:
        """Keys of some tiles, (tiles, H, keys, D), from a copy: overlapping views."""
        return key_tiles(copy, self._columns, group.tiles)

    def add(self, copy: torch.Tensor, group: Group, part: torch.Tensor) -> None:
        """Adjoint of `take`."""
        add_key_tiles(copy, self._columns, group.tiles, part)


def dense_keys(tokens: torch.Tensor, pooled: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """Keys (..., tokens, H, D) that all image queries see: the text's, pooled ones if not far."""
    text = tokens[..., : geometry.text_length, :, :]
    return text if geometry.far_levels else torch.cat([text, pooled], dim=-3)


def dense_bias(bias: torch.Tensor, geometry: Geometry, dtype: torch.dtype) -> torch.Tensor | None:
    """What is added to the scores of the dense keys, (1, H, 1, keys), if anything is."""
    if geometry.far_levels or not len(bias):
        return None
    return F.pad(bias.to(dtype).T, (geometry.text_length, 0))[None, :, None]


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
