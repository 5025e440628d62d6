"""CLEAR attention by a compiled kernel, on a CPU: see forward.cpp."""

from __future__ import annotations

import ctypes
import functools
import math
from pathlib import Path

import numpy as np
import torch

from ...cells import MOST_LEVELS
from ...groups import group_of
from ...opaque import Geometry
from ...window import LARGEST_FAR_GRID, Window
from .build import load_for
from .shares import DTYPES, Tensor, by_threads, share_of, why_not

# Rows and columns together, as of far keys: the kernel counts tokens in 32 bits.
LARGEST_GRID = LARGEST_FAR_GRID
# What a thread takes at a time, if there is enough for all. Rows of image queries, at least: the
# keys above and below are copied once more.
SHARE_ROWS = 32
# Text queries: the second-level cache holds their state beside some keys.
SHARE_TEXT = 256


class _Problem(ctypes.Structure):
    _fields_ = (
        *(
            (name, Tensor)
            for name in (
                *("query", "out", "lse", "key", "value", "packed_key", "packed_value", "bias"),
            )
        ),
        *(
            (name, ctypes.c_int32)
            for name in (
                *("dtype", "text_queries", "text_length", "height", "width", "radius"),
                *("query_start", "pooled_length", "far_levels", "group"),
            )
        ),
        ("given", (ctypes.c_int32 * 2) * (MOST_LEVELS + 1)),
        ("scale", ctypes.c_float),
    )


# What the kernel takes: a problem, whether of the text, a batch item, a head, first query or row,
# the one after the last.
ARGUMENTS = (
    *(ctypes.POINTER(_Problem), ctypes.c_int),
    *(ctypes.c_int64, ctypes.c_int64),
    *(ctypes.c_int, ctypes.c_int),
)


# Whether of text queries, batch item, head, first query (or row of the image), the one after.
Share = tuple[bool, int, int, int, int]


@functools.cache
def _library(head_dim: int) -> ctypes.CDLL | str:
    """The kernel for a head_dim, or why there is none. Compiled once per machine: seconds."""
    source = Path(__file__).with_suffix(".cpp")
    return load_for(head_dim, source, "attend_share", ARGUMENTS, ctypes.c_int64)


def why_not_compiled(query: torch.Tensor, height: int, width: int) -> str | None:
    """Why the kernel cannot run on such queries of a grid, in tokens; None if it can."""
    reason = why_not(query)
    if reason is not None:
        return reason
    if height + width > LARGEST_GRID:
        return f"takes at most {LARGEST_GRID} rows and columns, got {height} + {width}"
    library = _library(query.shape[-1])
    return library if isinstance(library, str) else None


def attend_compiled(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pooled_key: torch.Tensor,
    pooled_value: torch.Tensor,
    bias: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    geometry: Geometry,
) -> int:
    """Attention of text queries to all given tokens, of image queries to what the window says.

    Args:
        query, out: (batch, text and image queries, heads, head_dim), head_dim contiguous.
        key, value: (batch, text and given image tokens, key heads, head_dim), head_dim contiguous.
        pooled_key, pooled_value: (batch, pooled, key heads, head_dim), none or more.
        bias: (pooled, heads) float32, any strides, added to the scores of pooled keys; (0, heads)
            where nothing is.
        lse: (batch, text and image queries, heads), float32.
        geometry: of the window.

    Returns:
        The (query, key) pairs computed, masked ones too, over all batch items and heads. `out` and
        `lse` are written; those of a query that sees no key are 0 and hugely negative.

    Raises:
        MemoryError: no room for the rows of keys that a tile reaches.
    """
    library = _library(query.shape[-1])
    assert isinstance(library, ctypes.CDLL), library
    height, width, text_length, radius, scale, query_start, query_stop, levels, _ = geometry
    text_queries = query.shape[1] - geometry.image_queries
    given = [geometry.given_rows(level) for level in range(levels + 1)]
    pooled_length = pooled_key.shape[1]
    if not len(bias):
        bias = query.new_zeros(1, 1, dtype=torch.float32).expand(pooled_length, query.shape[2])
    # The kernel believes these numbers.
    start, stop = given[0]
    assert key.shape[1] == value.shape[1] == text_length + (stop - start) * width
    assert len(bias) == pooled_length == pooled_value.shape[1]
    assert not levels or pooled_length == geometry.first_cell(levels + 1)
    assert 0 <= query_start < query_stop <= height
    assert text_queries >= 0
    assert query.shape[2] == group_of(query, key) * key.shape[2]
    assert key.shape[2] == value.shape[2] == pooled_key.shape[2] == pooled_value.shape[2]
    packed_key, packed_value = (
        _packed(x[:, :text_length], pooled)
        for x, pooled in ((key, pooled_key), (value, pooled_value))
    )
    tensors = (query, out, lse, key, value, packed_key, packed_value, bias[None])
    problem = _Problem(
        *(Tensor.of(x) for x in tensors),
        DTYPES.index(query.dtype), text_queries, text_length, height, width, radius,
        query_start, pooled_length, levels, group_of(query, key), tuple(given), scale,
    )  # fmt: skip
    rows, columns = _tile(library)
    text_share = share_of(text_queries, SHARE_TEXT, rows * columns)
    image_share = share_of(query_stop - query_start, max(SHARE_ROWS, 2 * radius), rows)
    shares = [
        (text, item, head, start, min(start + share, stop))
        for text, first, stop, share in (
            (True, 0, text_queries, text_share),
            (False, query_start, query_stop, image_share),
        )
        for item in range(query.shape[0])
        for head in range(query.shape[2])
        for start in range(first, stop, share)
    ]

    def run(share: Share) -> int:
        return library.attend_share(problem, *share)

    pairs = by_threads(run, shares)
    if min(pairs, default=0) < 0:
        raise MemoryError("tiled attention: no memory for the keys that a tile reaches")
    return sum(pairs)


def _packed(text: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    """(batch, text + pooled, heads, head_dim) in float32, the tokens of a head side by side."""
    batch, length, heads, head_dim = text.shape
    packed = text.new_empty(
        batch, heads, length + pooled.shape[1], head_dim, dtype=torch.float32
    ).transpose(1, 2)
    packed[:, :length], packed[:, length:] = text, pooled
    return packed


def _tile(library: ctypes.CDLL) -> tuple[int, int]:
    """Rows and columns of a tile of queries: as many as this CPU's vectors have lanes."""
    rows, columns = (
        ctypes.c_int32.in_dll(library, name).value for name in ("tile_rows", "tile_columns")
    )
    return rows, columns


def executed_pairs(window: Window, head_dim: int) -> int:
    """(query, key) pairs of a head that the kernel computes, masked ones too."""
    library = _library(head_dim)
    assert isinstance(library, ctypes.CDLL), library
    rows, columns = _tile(library)
    start, stop = window.image_query_rows
    keys = math.ceil(window.text_query_length / (rows * columns)) * window.sequence_length
    dense = window.text_length + (0 if window.far_levels else window.pooled_length)
    keys += math.ceil((stop - start) / rows) * math.ceil(window.width / columns) * dense
    for level in range(window.far_levels + 1):
        if window.cells_of_level(level):
            keys += _level_keys(window, level, rows, columns)
    return keys * rows * columns


def _level_keys(window: Window, level: int, rows: int, columns: int) -> int:
    """Tokens or cells of a level that are computed for all tiles of rows x columns queries."""
    given = window.comparisons(level, "cpu")
    start, stop = window.given_rows(level)
    inner_y, inner_x, inner2, outer_y, outer_x, outer2 = (
        each.numpy().astype(np.int64).reshape(stop - start, -1) for each in given
    )
    left = 2 * np.arange(0, window.width, columns)
    right = np.minimum(left + 2 * (columns - 1), 2 * (window.width - 1))

    def side(square: np.ndarray, distance: np.ndarray) -> np.ndarray:
        """How far to the side what is nearer may be, (rows, 1); -1 where nothing is."""
        room = square[:, 0] - distance**2
        return np.where(room > 0, np.sqrt(np.maximum(room - 1, 0)).astype(int), -1)[:, None]

    keys = 0
    first, last = window.image_query_rows
    for top in range(first, last, rows):
        y = 2 * np.arange(top, min(top + rows, last))[:, None]
        outer = side(outer2, np.abs(y - outer_y[:, 0]).min(0))  # of the nearest query
        inner = side(inner2, np.abs(y - inner_y[:, 0]).max(0))  # of the farthest
        seen = np.searchsorted(outer_x[0], right + outer, "right")
        seen -= np.searchsorted(outer_x[0], left - outer)
        into = np.searchsorted(inner_x[0], left + inner, "right")
        into -= np.searchsorted(inner_x[0], right - inner)
        keys += int(((outer >= 0) * (seen - into.clip(0))).sum())
    return keys
