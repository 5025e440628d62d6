"""Two-dimensional tiles of a `Window`: which rectangle of keys a tile of queries can see.

The grid is cut into bands of TILE_ROWS rows, a band into tiles of TILE_COLUMNS columns. All tiles
whose key rectangle is not clipped by the border look alike; consecutive ones form one `Run`, and
the keys of a run are read as overlapping slices of one column-major buffer, without a copy per
tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .window import Window

# Size of a query tile, in tokens. PyTorch's fused CPU attention takes 32 queries at once: a larger
# tile only sees more keys than it needs, a smaller one makes its products too thin. Measured equal
# within noise from 4 x 8 to 16 x 4; 8 rows, because the keys of every band are copied once.
TILE_ROWS, TILE_COLUMNS = 8, 4


@dataclass(frozen=True)
class Span:
    """A stretch of queries along one axis and the keys they can reach, in tokens."""

    start: int
    stop: int
    key_start: int
    key_stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def key_length(self) -> int:
        return self.key_stop - self.key_start

    @property
    def shape(self) -> tuple[int, int, int]:
        """Everything the mask depends on: the same for all spans the border does not clip."""
        return self.length, self.start - self.key_start, self.key_length


@dataclass(frozen=True)
class Run:
    """`count` consecutive tiles of the same shape; `first` is the leftmost."""

    first: Span
    count: int

    @property
    def stop(self) -> int:
        return self.first.start + self.count * self.first.length


def spans(length: int, radius: int, tile: int) -> Iterator[Span]:
    """Cut an axis of `length` tokens into stretches of `tile`, the last one shorter if need be."""
    reach = radius - 1
    for start in range(0, length, tile):
        stop = min(start + tile, length)
        yield Span(start, stop, max(0, start - reach), min(length, stop + reach))


def runs(width: int, radius: int) -> list[Run]:
    """The tiles of a band, left to right, with equal neighbours joined."""
    joined: list[Run] = []
    for span in spans(width, radius, TILE_COLUMNS):
        last = joined[-1] if joined else None
        if (
            last is not None
            and span.shape == last.first.shape
            and span.key_start - last.first.key_start == last.count * span.length
        ):
            joined[-1] = Run(last.first, last.count + 1)
        else:
            joined.append(Run(span, 1))
    return joined


def tile_bias(
    rows: Span, columns: Span, radius: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor | None:
    """Additive mask of one tile: 0 inside the disc, -inf outside; None if all is inside.

    Returns:
        (tile width * tile height, key width * key height) in `dtype`, both column-major.
    """

    def distance2(span: Span) -> torch.Tensor:
        query = torch.arange(span.start, span.stop, device=device)
        key = torch.arange(span.key_start, span.key_stop, device=device)
        return (query[:, None] - key[None, :]) ** 2  # [length, key_length]

    dy2, dx2 = distance2(rows), distance2(columns)
    inside = dx2[:, None, :, None] + dy2[None, :, None, :] < radius**2
    if inside.all():
        return None
    bias = torch.zeros(inside.shape, dtype=dtype, device=device)
    bias.masked_fill_(~inside, float("-inf"))
    return bias.reshape(columns.length * rows.length, columns.key_length * rows.key_length)


def executed_pairs(window: Window) -> int:
    """(query, key) pairs the tiled path computes, masked ones too; see `attended_pairs`."""
    radius = window.disc_radius
    # A tile computes a full rectangle: the sum over tiles factorises into rows times columns.
    rows, columns = (
        sum(span.length * span.key_length for span in spans(length, radius, tile))
        for length, tile in ((window.height, TILE_ROWS), (window.width, TILE_COLUMNS))
    )
    dense = window.text_length * window.sequence_length + window.image_length * (
        window.text_length + window.pooled_length
    )
    return dense + rows * columns
