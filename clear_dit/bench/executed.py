"""Keys that tiles compute for an image query, masked ones included, over those it attends to.

Counts, not measurements: the same on every machine, and what a kernel's choice of tiles costs.
Means over the image queries of one layer; text and pooled keys are included, text queries are not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from ..kernels.cells import cell_count
from ..kernels.flex import BLOCK
from ..kernels.tiled import lists, tiles
from ..kernels.triton.cell_lists import executed_far_keys
from ..kernels.triton.geometry import Tiling, executed_keys
from ..kernels.triton.tables import FORWARD
from ..kernels.window import Window

# Beyond it the lists of the Triton kernels' tiles take seconds and gigabytes.
LARGEST_LISTED_RADIUS = 128


def tile_choices(window: Window) -> list[dict[str, Any]]:
    """Every choice of tiles for a window.

    Those of the Triton kernels' tables, up to a radius of LARGEST_LISTED_RADIUS, and the others.

    Returns:
        rows with impl, query_tile, key_tile (tokens, as text; with far keys, which come by lists,
        how many at a time), keys_per_query and executed_over_exact.
    """
    exact = exact_keys(window)
    radius, far = window.disc_radius, window.far_levels > 0
    rectangle = (
        min(tiles.TILE_ROWS + 2 * (radius - 1), window.height),
        tiles.tile_columns(window.width, radius).key_length,
    )
    choices: list[tuple[str, tuple[int, ...], tuple[int, ...] | str, float]] = []
    configs = dict.fromkeys(
        (c.tiling, c.dense_keys, c.far_keys if far else 0)
        for table in FORWARD.values()
        for c in table
    )
    for tiling, dense_keys, far_keys in configs if radius <= LARGEST_LISTED_RADIUS else ():
        keys = triton_keys(window, tiling, dense_keys, far_keys)
        steps = (far_keys,) if far else (tiling.step_rows, tiling.step_columns)
        choices.append(("triton", (tiling.rows, tiling.columns), steps, keys))
    tile = (tiles.TILE_ROWS, tiles.TILE_COLUMNS)
    choices += [
        ("tiled", tile, "all" if far else rectangle, tiled_keys(window)),
        ("flex", (1, BLOCK), (1, BLOCK), raster_keys(window)),
    ]
    return [
        {
            "impl": impl,
            "query_tile": "x".join(map(str, queries)),
            "key_tile": keys if isinstance(keys, str) else "x".join(map(str, keys)),
            "keys_per_query": executed,
            "executed_over_exact": executed / exact,
        }
        for impl, queries, keys, executed in choices
    ]


def exact_keys(window: Window) -> float:
    """Keys an image query attends to, text and pooled included, the mean over the image."""
    text_pairs = window.text_length * window.sequence_length
    return (window.attended_pairs() - text_pairs) / window.image_length


def triton_keys(window: Window, tiling: Tiling, dense_keys: int, far_keys: int) -> float:
    """Keys that a program of the Triton kernels computes for an image query.

    dense_keys, far_keys: text and listed keys of a step.
    """
    if not window.far_levels:
        return executed_keys(window, tiling, dense_keys)
    tiles_of_axes = (
        math.ceil(window.height / tiling.rows),
        math.ceil(window.width / tiling.columns),
    )
    queries = math.prod(tiles_of_axes) * tiling.rows * tiling.columns
    text = math.ceil(window.text_length / dense_keys) * dense_keys
    listed = executed_far_keys(window, tiling, far_keys)
    return sum(listed) + text * queries / window.image_length


def tiled_keys(window: Window) -> float:
    """Keys that PyTorch's operators compute for an image query where no kernel is compiled."""
    text_pairs = window.text_length * window.sequence_length
    return (lists.executed_tile_pairs(window) - text_pairs) / window.image_length


def raster_keys(window: Window) -> float:
    """Keys FlexAttention computes for an image query: blocks of 128 raster tokens by 128.

    The same blocks as `flex.block_mask` visits, by arithmetic on stretches of rows: that one looks
    at every pair.
    """
    text, sequence = window.text_length, window.sequence_length
    query_blocks = math.ceil(sequence / BLOCK)
    key_blocks = math.ceil((sequence + window.pooled_length) / BLOCK)
    visited = (_far_blocks if window.far_levels else _disc_blocks)(window, query_blocks, key_blocks)
    visited[:, : math.ceil(text / BLOCK)] = True
    if text % BLOCK:  # text queries share a block with image queries
        visited[text // BLOCK, : math.ceil(sequence / BLOCK)] = True
    image_queries = torch.bincount(
        (text + torch.arange(window.image_length)) // BLOCK, minlength=query_blocks
    )
    keys = BLOCK * visited.sum(dim=1)
    return float((keys * image_queries).sum()) / window.image_length


def _disc_blocks(window: Window, query_blocks: int, key_blocks: int) -> torch.Tensor:
    """Which blocks of image queries visit which of keys, bool (query blocks, key blocks)."""
    # +1 where visited blocks begin, -1 after they end: summed along the keys it tells them.
    edges = torch.zeros(query_blocks, key_blocks + 1, dtype=torch.int32)
    for block, first, last in _raster_visits(window):
        one = torch.ones(len(block), dtype=torch.int32)
        edges.index_put_((block, first), one, accumulate=True)
        edges.index_put_((block, last + 1), -one, accumulate=True)
    visited = edges.cumsum_(dim=1)[:, :-1] > 0
    if window.pooled_length:
        visited[:, window.sequence_length // BLOCK :] = True
    return visited


def _far_blocks(window: Window, query_blocks: int, key_blocks: int) -> torch.Tensor:
    """As `_disc_blocks`, with far keys; stretch by stretch of queries, and level by level.

    A cell is seen from a stretch iff some of its queries lie in reach of the cell around, and not
    all of these look into the cell: two intervals of columns, of which one has to be left over.
    """
    visited = torch.zeros(query_blocks, key_blocks, dtype=torch.bool)
    rows, blocks, left, right = _stretches(window)
    begin = window.text_length
    for level in range(window.far_levels + 1):
        columns = cell_count(window.width, level)
        seen = window.comparisons(level)
        for y in range(window.height):
            near = window.rows_in_reach(level, range(y, y + 1))
            cells = slice(near.start * columns, near.stop * columns)
            inner_y, inner_x, inner2, outer_y, outer_x, outer2 = (part[cells] for part in seen)
            first_in, last_in = _columns_within(inner_x, inner2 - (2 * y - inner_y) ** 2)
            first_out, last_out = _columns_within(outer_x, outer2 - (2 * y - outer_y) ** 2)
            own = rows == y
            low = torch.maximum(left[own, None], first_out)
            high = torch.minimum(right[own, None], last_out)
            some = (low <= high) & ((low < first_in) | (high > last_in))
            stretch, cell = some.nonzero(as_tuple=True)
            key = begin + near.start * columns + cell
            visited[blocks[own][stretch], key // BLOCK] = True
        begin += window.cells_of_level(level)
    return visited


def _columns_within(centre: torch.Tensor, room: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First and last column x with (2x - centre)^2 < room; the last before the first if none."""
    half = room.clamp(min=1).sub(1).double().sqrt().floor().int()
    first, last = -((half - centre) // 2), (centre + half) // 2
    return first, torch.where(room > 0, last, first - 1)


def _stretches(
    window: Window,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Runs of image queries in one row and in one block: row, block, first and last column."""
    text, width, image = window.text_length, window.width, window.image_length
    rows, blocks = torch.arange(0, image, width), torch.arange(-text % BLOCK, image, BLOCK)
    start = torch.cat([rows, blocks]).unique()
    stop = torch.cat([start[1:], torch.tensor([image])])
    return start // width, (text + start) // BLOCK, start % width, (stop - 1) % width


def _raster_visits(
    window: Window,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(query blocks, first and last key block), one triple of tensors for each row distance."""
    text, width = window.text_length, window.width
    y, block, left, right = _stretches(window)
    reach = min(window.disc_radius, window.height) - 1
    for dy in range(-reach, reach + 1):
        half = math.isqrt(window.disc_radius**2 - dy**2 - 1)
        there = (y + dy >= 0) & (y + dy < window.height)
        key_row = text + (y + dy) * width
        first = (key_row + (left - half).clamp(min=0)) // BLOCK
        last = (key_row + (right + half).clamp(max=width - 1)) // BLOCK
        yield block[there], first[there], last[there]
