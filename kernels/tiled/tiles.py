"""Two-dimensional tiles of a `Window`: which rectangle of keys a tile of queries can see.

The grid is cut into bands of TILE_ROWS rows, a band into tiles of TILE_COLUMNS columns. All tiles
of a band read key rectangles of one size, as overlapping slices of one column-major buffer: no copy
per tile. Beyond the left and right border the buffer is padded, and the mask hides the padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

# Size of a query tile, in tokens. Tall and narrow: the keys of every band are copied once, and
# PyTorch's fused CPU attention takes at most 32 queries of a small tile at a time.
TILE_ROWS, TILE_COLUMNS = 8, 4
# Elements of the masks of the tiles that are computed in one call (128 MiB in float32).
MASK_ELEMENTS = 2**25


@dataclass(frozen=True)
class Band:
    """Rows of queries and the rows of keys they can reach, clipped at the border."""

    start: int
    stop: int
    key_start: int
    key_stop: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Everything a mask depends on: the same for all bands the border does not clip."""
        return self.stop - self.start, self.start - self.key_start, self.key_stop - self.key_start


def bands(height: int, radius: int, rows: range | None = None) -> Iterator[Band]:
    """Cut the rows of queries into stretches of TILE_ROWS, the last one shorter if need be.

    rows: of queries; all where None.
    """
    reach = radius - 1
    rows = range(height) if rows is None else rows
    for start in range(rows.start, rows.stop, TILE_ROWS):
        stop = min(start + TILE_ROWS, rows.stop)
        yield Band(start, stop, max(0, start - reach), min(height, stop + reach))


@dataclass(frozen=True)
class Columns:
    """The tiles of a band, left to right.

    Attributes:
        count: of tiles; the last one may stick out over the border.
        key_length: columns of keys a tile reads.
        stride: columns from one tile's keys to the next one's; 0 where every tile reads all.
        padding: columns of keys before the left border, and at least as many after the right.
    """

    width: int
    count: int
    key_length: int
    stride: int
    padding: int

    @property
    def query_width(self) -> int:
        """Columns of queries, those beyond the right border included."""
        return self.count * TILE_COLUMNS

    @property
    def key_width(self) -> int:
        """Columns of keys, the padding on both sides included."""
        return (self.count - 1) * self.stride + self.key_length


def tile_columns(width: int, radius: int) -> Columns:
    """Tiles for rows of `width` tokens: with padded keys, or all reading a whole narrow row."""
    count, reach = -(-width // TILE_COLUMNS), radius - 1
    if TILE_COLUMNS + 2 * reach >= width:
        return Columns(width, count, key_length=width, stride=0, padding=0)
    key_length = TILE_COLUMNS + 2 * reach
    return Columns(width, count, key_length, stride=TILE_COLUMNS, padding=reach)


def tile_bias(
    band: Band,
    columns: Columns,
    tiles: range,
    radius: int,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor | None:
    """Additive mask of some tiles of a band: 0 inside the disc, -inf outside.

    Queries beyond the border may see the padding, so that they stay finite.

    Returns:
        (tiles, 1, tile width * tile height, key width * key height) in `dtype`, both column-major;
        None if all is inside.
    """
    tile = torch.arange(tiles.start, tiles.stop, device=device)[:, None]
    query_x = tile * TILE_COLUMNS + torch.arange(TILE_COLUMNS, device=device)
    key_x = (
        tile * columns.stride - columns.padding + torch.arange(columns.key_length, device=device)
    )
    query_y = torch.arange(band.start, band.stop, device=device)
    key_y = torch.arange(band.key_start, band.key_stop, device=device)
    dx2 = (query_x[:, :, None] - key_x[:, None, :]) ** 2  # [tiles, X, KX]
    dy2 = (query_y[:, None] - key_y[None, :]) ** 2  # [Y, KY]
    real = (key_x >= 0) & (key_x < columns.width)
    visible = real[:, None, :] | (query_x >= columns.width)[:, :, None]
    inside = dx2[:, :, None, :, None] + dy2[None, None, :, None, :] < radius**2
    inside &= visible[:, :, None, :, None]
    if inside.all():
        return None
    bias = torch.zeros(inside.shape, dtype=dtype, device=device)
    bias.masked_fill_(~inside, float("-inf"))
    return bias.flatten(3).flatten(1, 2).unsqueeze(1)
