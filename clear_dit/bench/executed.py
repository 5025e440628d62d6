"""Keys that tiles compute for an image query, masked ones included, over those it attends to.

Counts, not measurements: the same on every machine, and what a kernel's choice of tiles costs.
Means over the image queries of one layer; text and pooled keys are included, text queries are not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from ..kernels.flex import BLOCK
from ..kernels.tiled import lists, tiles
from ..kernels.triton.geometry import exact_keys, executed_keys
from ..kernels.triton.tables import FORWARD
from ..kernels.window import Window

# Beyond it the lists of the Triton kernels' tiles take seconds and gigabytes.
LARGEST_LISTED_RADIUS = 128


def tile_choices(window: Window) -> list[dict[str, Any]]:
    """Every choice of tiles for a window.

    Those of the Triton kernels' tables, up to a radius of LARGEST_LISTED_RADIUS, and the others.

    Returns:
        rows with impl, query_tile, key_tile (tokens, as text), keys_per_query and
        executed_over_exact.
    """
    exact = exact_keys(window)
    radius = window.disc_radius
    rectangle = (
        min(tiles.TILE_ROWS + 2 * (radius - 1), window.height),
        tiles.tile_columns(window.width, radius).key_length,
    )
    choices = []
    configs = dict.fromkeys((c.tiling, c.dense_keys) for table in FORWARD.values() for c in table)
    for tiling, dense_keys in configs if radius <= LARGEST_LISTED_RADIUS else ():
        keys = executed_keys(window, tiling, dense_keys)
        steps = (tiling.step_rows, tiling.step_columns)
        choices.append(("triton", (tiling.rows, tiling.columns), steps, keys))
    choices += [
        ("tiled", (tiles.TILE_ROWS, tiles.TILE_COLUMNS), rectangle, tiled_keys(window)),
        ("flex", (1, BLOCK), (1, BLOCK), raster_keys(window)),
    ]
    return [
        {
            "impl": impl,
            "query_tile": "x".join(map(str, queries)),
            "key_tile": "x".join(map(str, keys)),
            "keys_per_query": executed,
            "executed_over_exact": executed / exact,
        }
        for impl, queries, keys, executed in choices
    ]


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
    # +1 where visited blocks begin, -1 after they end: summed along the keys it tells them.
    edges = torch.zeros(query_blocks, key_blocks + 1, dtype=torch.int32)
    for block, first, last in _raster_visits(window):
        one = torch.ones(len(block), dtype=torch.int32)
        edges.index_put_((block, first), one, accumulate=True)
        edges.index_put_((block, last + 1), -one, accumulate=True)
    visited = edges.cumsum_(dim=1)[:, :-1] > 0
    visited[:, : math.ceil(text / BLOCK)] = True
    if window.pooled_length:
        visited[:, sequence // BLOCK :] = True
    if text % BLOCK:  # text queries share a block with image queries
        visited[text // BLOCK, : math.ceil(sequence / BLOCK)] = True
    image_queries = torch.bincount(
        (text + torch.arange(window.image_length)) // BLOCK, minlength=query_blocks
    )
    keys = BLOCK * visited.sum(dim=1)
    return float((keys * image_queries).sum()) / window.image_length


def _raster_visits(
    window: Window,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(query blocks, first and last key block), one triple of tensors for each row distance."""
    text, width, image = window.text_length, window.width, window.image_length
    # Stretches of queries in one row and in one block.
    rows, blocks = torch.arange(0, image, width), torch.arange(-text % BLOCK, image, BLOCK)
    start = torch.cat([rows, blocks]).unique()
    stop = torch.cat([start[1:], torch.tensor([image])])
    y, left, right = start // width, start % width, (stop - 1) % width
    reach = min(window.disc_radius, window.height) - 1
    for dy in range(-reach, reach + 1):
        half = math.isqrt(window.disc_radius**2 - dy**2 - 1)
        there = (y + dy >= 0) & (y + dy < window.height)
        key_row = text + (y + dy) * width
        first = (key_row + (left - half).clamp(min=0)) // BLOCK
        last = (key_row + (right + half).clamp(max=width - 1)) // BLOCK
        yield ((text + start) // BLOCK)[there], first[there], last[there]
