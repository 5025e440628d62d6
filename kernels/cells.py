"""Cells: what stands for far tokens, ever coarser the farther they are.

A cell of level l covers 2^l x 2^l tokens from the upper left corner of the image; a last partial
cell the tokens it has. A query looks into a cell, and sees its children instead (the cells of the
level below, at last the tokens), iff the cell's centre is nearer than radius * 2^(l - 1) tokens and
it looks into the cell around. So every token counts exactly once: alone, or within one cell. It is
the near and far field of the fast multipole method (Greengard, Rokhlin 1987) in a softmax, as in
H-Transformer-1D (arXiv 2107.11906) and Fast Multipole Attention (arXiv 2310.11960). A cell's key
and value are means of its tokens' weighted by the softmax of scale * |key|^2 (pooling.py): long
keys dominate what the tokens would add to a query's softmax.

From a radius of 2 on a cell that is near enough lies in one that is: the centres are at most
sqrt(2) * 2^(l - 1) tokens apart, and the reach grows by radius * 2^(l - 1). So two comparisons
decide: is the cell's own centre beyond the reach of its level, and is the centre of the cell around
within that of the next? Rows and columns are doubled below, so that centres are integers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

# Levels at most: such a cell covers more tokens than any image has.
MOST_LEVELS = 16
# Levels where as many as the grid needs are asked for. The last level's cells have 1,024 tokens a
# side; a smaller grid's superfluous levels cost nothing, and a constant makes no new graph under
# torch.compile.
FAR_LEVELS = 10
# No squared distance is as large, in doubled tokens: a reach without end, and still an int32.
ENDLESS = 2**30


def cell_count(length: int, level: int) -> int:
    """Cells of a level along an axis of `length` tokens, a last partial one included."""
    return -(-length // 2**level)


def doubled_centres(
    length: int, level: int, device: torch.device | str | None = None
) -> torch.Tensor:
    """Twice the place of the centre of every cell of an axis, int32 (cells,)."""
    first = torch.arange(cell_count(length, level), dtype=torch.int32, device=device) * 2**level
    return first + (first + 2**level).clamp(max=length) - 1


def _doubled_centres(length: int, level: int) -> np.ndarray:
    """The same as int64 of NumPy, also where torch makes fake tensors."""
    first = np.arange(cell_count(length, level)) * 2**level
    return first + np.minimum(first + 2**level, length) - 1


def tokens_of_cells(
    length: int, level: int, device: torch.device | str | None = None
) -> torch.Tensor:
    """Tokens of every cell of an axis, int32 (cells,)."""
    first = torch.arange(cell_count(length, level), dtype=torch.int32, device=device) * 2**level
    return (length - first).clamp(max=2**level)


def doubled_reach2(radius: int, level: int) -> int:
    """Square of twice the distance at which a cell is looked into no more, at most `ENDLESS`."""
    return min((radius * 2**level) ** 2, ENDLESS)


def compared_reach2(radius: int, levels: int, level: int) -> tuple[int, int]:
    """inner2 and outer2 of a level's `Comparisons`."""
    inner2 = doubled_reach2(radius, level) if level else 0
    if levels == 0:
        return inner2, doubled_reach2(radius, 1)
    return inner2, doubled_reach2(radius, level + 1) if level < levels else ENDLESS


def compared_centres(
    length: int, levels: int, level: int, device: torch.device | str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a level's cells along an axis, inner and outer of `Comparisons`, int32 (cells,) each."""
    own = doubled_centres(length, level, device)
    if level >= levels:
        return own, own
    return own, doubled_centres(length, level + 1, device).repeat_interleave(2)[: len(own)]


class Comparisons(NamedTuple):
    """What decides who sees a key: int32 (keys,) each, in doubled tokens.

    A query at (y, x) sees it iff (2y - inner_y)^2 + (2x - inner_x)^2 >= inner2 and
    (2y - outer_y)^2 + (2x - outer_x)^2 < outer2.
    """

    inner_y: torch.Tensor
    inner_x: torch.Tensor
    inner2: torch.Tensor
    outer_y: torch.Tensor
    outer_x: torch.Tensor
    outer2: torch.Tensor

    def seen(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Whether queries at rows y and columns x, (queries, 1), see the keys: (queries, keys)."""
        inner = (2 * y - self.inner_y) ** 2 + (2 * x - self.inner_x) ** 2
        outer = (2 * y - self.outer_y) ** 2 + (2 * x - self.outer_x) ** 2
        return (inner >= self.inner2) & (outer < self.outer2)


def comparisons(
    height: int,
    width: int,
    radius: int,
    levels: int,
    level: int,
    rows: tuple[int, int],
    device: torch.device | str | None = None,
) -> Comparisons:
    """Those of a level's cells, of tokens for level 0, in raster order.

    Args:
        height, width: of the image, in tokens.
        radius: in tokens; with levels = 0, that of the disc around the token itself.
        levels: of cells that there are; 0 where there are none.
        level: 0 to levels.
        rows: of the level's cells, first and the one after the last: those that are wanted.
    """
    y, around_y = compared_centres(height, levels, level, device)
    x, around_x = compared_centres(width, levels, level, device)
    inner2, outer2 = compared_reach2(radius, levels, level)
    start, stop = rows
    columns = len(x)

    def by_row(values: torch.Tensor) -> torch.Tensor:
        return values[start:stop].repeat_interleave(columns)

    def by_column(values: torch.Tensor) -> torch.Tensor:
        return values.repeat(stop - start)

    def same(value: int) -> torch.Tensor:
        return y.new_full(((stop - start) * columns,), value)

    return Comparisons(
        by_row(y), by_column(x), same(inner2),
        by_row(around_y), by_column(around_x), same(outer2),
    )  # fmt: skip


def rows_in_reach(height: int, radius: int, levels: int, level: int, rows: range) -> range:
    """The rows of a level's cells (of tokens, for level 0) that queries of some rows may see.

    Args:
        height: of the image, in tokens.
        radius, levels, level: as in `comparisons`.
        rows: of the queries, in tokens.
    """
    if level == levels and levels:
        return range(cell_count(height, level))
    around = level + 1 if levels else 0
    reach2 = doubled_reach2(radius, around or 1)
    centres = _doubled_centres(height, around)
    distance = np.maximum(2 * rows.start - centres, centres - 2 * (rows.stop - 1)).clip(0)
    near = np.flatnonzero(distance**2 < reach2)
    step = 2 if levels else 1
    stop = min(step * (int(near[-1]) + 1), cell_count(height, level))
    return range(step * int(near[0]), stop)


def levels_needed(height: int, width: int, radius: int) -> int:
    """The coarsest level of which some query of an image may see a cell, at least 1."""
    level = 1
    while doubled_reach2(radius, level + 1) <= 4 * (height**2 + width**2):
        level += 1
    return level


def looked_into(
    height: int,
    width: int,
    radius: int,
    level: int,
    rows: range,
    given: tuple[int, int],
    children: bool,
) -> int:
    """Number of pairs of an image query and a cell of a level that it looks into.

    Args:
        height, width, radius: in tokens.
        level: at least 1.
        rows: of the queries.
        given: rows of the cells that are counted.
        children: count the cells' children, cells (or tokens) of the level below, instead; `given`
            is then of their rows.
    """
    counted = []
    for length, queries, wanted in (
        (height, rows, given),
        (width, range(width), (0, cell_count(width, level - 1 if children else level))),
    ):
        centres = _doubled_centres(length, level)
        first = np.arange(len(centres)) * (2 if children else 1)
        last = first + (2 if children else 1)
        weights = np.clip(np.minimum(last, wanted[1]) - np.maximum(first, wanted[0]), 0, None)
        distance = np.abs(2 * np.arange(queries.start, queries.stop)[:, None] - centres)
        every = np.broadcast_to(weights, distance.shape).reshape(-1)
        counted.append(np.bincount(distance.reshape(-1), weights=every, minlength=1))
    by_row, by_column = counted
    up_to = np.cumsum(by_column)
    left = doubled_reach2(radius, level) - 1 - np.arange(len(by_row)) ** 2
    half = np.array([math.isqrt(room) if room >= 0 else -1 for room in left.tolist()])
    inside = np.where(half >= 0, up_to[np.minimum(half, len(up_to) - 1)], 0)
    return round(float(by_row @ inside))
