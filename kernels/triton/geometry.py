"""Which key tiles a query tile visits: flat lists of offsets, kilobytes at any resolution.

The grid is cut into query tiles. All tiles that the border clips alike see the same key tiles
relative to themselves, so the lists depend on the classes of borders only: one for the interior,
and some for each border. A list holds first the key tiles that every query of the tile sees in
full (no mask), then the others. The disc is symmetric: the same lists, read with keys and queries
exchanged, serve the gradients of key and value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ..window import Window
from .resident import resident


@dataclass(frozen=True)
class Tiling:
    """Shapes, in tokens, of the tiles of one kernel.

    Attributes:
        rows, columns: of the tile a program owns (queries; keys in the kernel of their gradients).
        step_rows, step_columns: of the tiles it visits one after the other.
    """

    rows: int
    columns: int
    step_rows: int
    step_columns: int


@dataclass(frozen=True)
class Visits:
    """The lists of a grid, as tensors on one device, int32 but for `offsets`.

    Attributes:
        offsets: (n, 2), rows and columns from the owner's first token to the visited tile's first.
            int16, or int32 where they are larger: Triton copies numbers of 32 bits ahead in a stage
            of their own, which leaves one less for the tiles.
        ranges: (row classes, column classes, 3), where a list begins, where its masked part begins
            and where it ends in `offsets`.
        row_class, column_class: class of every row, and every column, of owner tiles.
    """

    offsets: torch.Tensor
    ranges: torch.Tensor
    row_class: torch.Tensor
    column_class: torch.Tensor


@dataclass(frozen=True)
class _Reach:
    """Rows (or columns) that exist around an owner's first, from `low` to `high` inclusive."""

    low: int
    high: int


def _reaches(length: int, tile: int, reach: int, owned: range) -> list[_Reach]:
    """What each tile can see of an axis; tiles cut up the `owned` part of it."""
    return [
        _Reach(
            max(-start, -reach),
            min(length - 1 - start, min(tile, owned.stop - start) - 1 + reach),
        )
        for start in range(owned.start, owned.stop, tile)
    ]


def _half_chord(distance: int, radius: int) -> int:
    """Largest dx with dx^2 + distance^2 < radius^2; -1 where there is none."""
    left = radius**2 - 1 - distance**2
    return math.isqrt(left) if left >= 0 else -1


def _bands(
    rows: _Reach, columns: _Reach, tiling: Tiling, radius: int, first: int
) -> Iterator[tuple[int, int, int]]:
    """(row, column, count) of runs of visited tiles; the bands start at the row `first`."""
    for row in range(first, rows.high + 1, tiling.step_rows):
        last = min(row + tiling.step_rows - 1, rows.high)
        distance = max(0, -last, max(row, rows.low) - (tiling.rows - 1))
        half = _half_chord(distance, radius)
        left = max(-half, columns.low)
        right = min(tiling.columns - 1 + half, columns.high)
        if half >= 0 and left <= right:
            yield row, left, -(-(right - left + 1) // tiling.step_columns)


def _visits(rows: _Reach, columns: _Reach, tiling: Tiling, radius: int) -> np.ndarray:
    """(n, 2) offsets of the tiles that cover all keys in reach, by the cheapest start of bands."""
    top = max(rows.low, -(radius - 1))
    starts = range(top, top - tiling.step_rows, -1)
    cover = min(
        (list(_bands(rows, columns, tiling, radius, first)) for first in starts),
        key=lambda bands: sum(count for *_, count in bands),
    )
    parts = [
        np.stack([np.full(count, row), column + tiling.step_columns * np.arange(count)], axis=1)
        for row, column, count in cover
    ]
    return np.concatenate([np.empty((0, 2), dtype=np.int64), *parts])


def _inner(
    offsets: np.ndarray, rows: _Reach, columns: _Reach, tiling: Tiling, radius: int
) -> np.ndarray:
    """Which visited tiles lie in the grid and in the disc of every token of the owner."""
    far = np.zeros(len(offsets), dtype=np.int64)
    inside = np.ones(len(offsets), dtype=bool)
    for axis, (reach, own, step) in enumerate(
        ((rows, tiling.rows, tiling.step_rows), (columns, tiling.columns, tiling.step_columns))
    ):
        low = offsets[:, axis].astype(np.int64)
        high = low + step - 1
        inside &= (low >= reach.low) & (high <= reach.high)
        far += np.maximum(abs(high), abs(own - 1 - low)) ** 2
    return inside & (far < radius**2)


def visits(
    height: int,
    width: int,
    radius: int,
    tiling: Tiling,
    device: torch.device,
    owner_rows: tuple[int, int] | None = None,
) -> Visits:
    """The lists of a grid of height x width tokens for discs of `radius` tokens.

    owner_rows: (start, stop) of the rows that owners take up; all where None.

    A pure function of its arguments; kept on the device, because a model asks once per layer and
    step.
    """
    return resident(_visit_lists, (height, width, radius, tiling, owner_rows), device)


def _visit_lists(
    height: int, width: int, radius: int, tiling: Tiling, owner_rows: tuple[int, int] | None
) -> Visits:
    row_reach = _reaches(height, tiling.rows, radius - 1, range(*(owner_rows or (0, height))))
    column_reach = _reaches(width, tiling.columns, radius - 1, range(width))
    row_classes, column_classes = list(dict.fromkeys(row_reach)), list(dict.fromkeys(column_reach))
    ranges = np.zeros((len(row_classes), len(column_classes), 3), dtype=np.int32)
    lists, begin = [], 0
    for i, rows in enumerate(row_classes):
        for j, columns in enumerate(column_classes):
            found = _visits(rows, columns, tiling, radius)
            inner = _inner(found, rows, columns, tiling, radius)
            lists += [found[inner], found[~inner]]
            ranges[i, j] = begin, begin + inner.sum(), begin + len(found)
            begin += len(found)
    offsets = np.concatenate(lists)
    narrow = np.abs(offsets).max(initial=0) <= np.iinfo(np.int16).max
    arrays = (
        ranges,
        np.array([row_classes.index(reach) for reach in row_reach]),
        np.array([column_classes.index(reach) for reach in column_reach]),
    )
    typed = (
        offsets.astype(np.int16 if narrow else np.int32),
        *(array.astype(np.int32) for array in arrays),
    )
    return Visits(*(torch.from_numpy(array) for array in typed))


def executed_keys(window: Window, tiling: Tiling, text_block: int = 64) -> float:
    """Keys a program computes for each image query, the mean over the image.

    Text and pooled keys, in blocks of `text_block`, are included; masked keys and queries beyond
    the border too.
    """
    radius = window.disc_radius
    found = visits(window.height, window.width, radius, tiling, torch.device("cpu"))
    counts = (found.ranges[..., 2] - found.ranges[..., 0]).double()
    visited = counts[found.row_class.long()][:, found.column_class.long()].sum().item()
    dense = sum(
        -(-length // text_block) * text_block
        for length in (window.text_length, window.pooled_length)
    )
    tiles = found.row_class.numel() * found.column_class.numel()
    step = tiling.step_rows * tiling.step_columns
    queries = tiling.rows * tiling.columns
    return (visited * step + tiles * dense) * queries / window.image_length
