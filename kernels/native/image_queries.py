"""Attention of image queries by a compiled kernel, on a CPU: see image_queries.cpp."""

from __future__ import annotations

import ctypes
import functools
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from ..window import Window
from .build import BuildError, load

# A dtype's place is its number in the kernel, which computes in float32.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_HEAD_DIM = 128
# Rows and columns together: squares of distances are exact in float32.
LARGEST_GRID = 4096
# Rows of queries in a thread's share, at least; the rows of keys above and below are copied again.
SHARE_ROWS = 32


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch", "token", "head")),
    )


class _Problem(ctypes.Structure):
    _fields_ = (
        *(
            (name, _Tensor)
            for name in ("query", "key", "value", "dense_key", "dense_value", "out", "lse")
        ),
        *(
            (name, ctypes.c_int32)
            for name in ("dtype", "height", "width", "radius", "query_start", "dense_length")
        ),
        ("scale", ctypes.c_float),
    )


# What the kernel takes: a problem, a batch item, a head, first row of queries, row after the last.
ARGUMENTS = (
    ctypes.POINTER(_Problem),
    *(ctypes.c_int64, ctypes.c_int64),
    *(ctypes.c_int, ctypes.c_int),
)


@functools.cache
def _library(head_dim: int) -> ctypes.CDLL | str:
    """The kernel for a head_dim, or why there is none. Compiled once per machine: seconds."""
    try:
        library = load(Path(__file__).with_suffix(".cpp"), [f"HEAD_DIM={head_dim}"])
    except BuildError as error:
        return str(error)
    library.attend_image_queries.restype = ctypes.c_int64
    library.attend_image_queries.argtypes = ARGUMENTS
    return library


def why_not_compiled(query: torch.Tensor, height: int, width: int) -> str | None:
    """Why the kernel cannot run on such queries of a grid, in tokens; None if it can."""
    if query.device.type != "cpu":
        return f"needs a CPU, got a query on {query.device.type!r}"
    if query.dtype not in DTYPES:
        return f"takes float16, bfloat16 or float32, got {query.dtype}"
    if not 1 <= query.shape[-1] <= LARGEST_HEAD_DIM:
        return f"takes a head_dim of 1 to {LARGEST_HEAD_DIM}, got {query.shape[-1]}"
    if height + width > LARGEST_GRID:
        return f"takes at most {LARGEST_GRID} rows and columns, got {height} + {width}"
    library = _library(query.shape[-1])
    return library if isinstance(library, str) else None


def attend_compiled(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dense_key: torch.Tensor,
    dense_value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    height: int,
    width: int,
    radius: int,
    scale: float,
    query_start: int,
    query_stop: int,
) -> int:
    """Softmax over the disc's keys and over dense keys, which every query sees.

    Args:
        query, out: (batch, tokens of the rows of queries, heads, head_dim), head_dim contiguous.
        key, value: (batch, image tokens, heads, head_dim), head_dim contiguous.
        dense_key, dense_value: (batch, dense tokens, heads, head_dim), none or more.
        lse: (batch, tokens of the rows of queries, heads), float32.

    Returns:
        The (query, key) pairs computed, masked ones too, over all batch items and heads. `out` and
        `lse` are written.

    Raises:
        MemoryError: no room for the rows of keys that a tile reaches.
    """
    library = _library(query.shape[-1])
    assert isinstance(library, ctypes.CDLL), library
    dense_key, dense_value = (
        x.transpose(1, 2).to(torch.float32).contiguous().transpose(1, 2)
        for x in (dense_key, dense_value)
    )
    tensors = (query, key, value, dense_key, dense_value, out, lse)
    problem = _Problem(
        *(_Tensor(x.data_ptr(), *x.stride()[:3]) for x in tensors),
        DTYPES.index(query.dtype), height, width, radius, query_start, dense_key.shape[1], scale,
    )  # fmt: skip
    rows = _share(query_stop - query_start, radius, _tile(library)[0])
    shares = [
        (item, head, start, min(start + rows, query_stop))
        for item in range(query.shape[0])
        for head in range(query.shape[2])
        for start in range(query_start, query_stop, rows)
    ]

    def run(share: tuple[int, int, int, int]) -> int:
        return library.attend_image_queries(problem, *share)

    threads = min(torch.get_num_threads(), len(shares))
    if threads > 1:
        # One for this call: a process that forks takes no threads along.
        with ThreadPoolExecutor(threads) as pool:
            pairs = list(pool.map(run, shares))
    else:
        pairs = list(map(run, shares))
    if min(pairs, default=0) < 0:
        raise MemoryError("tiled attention: no memory for the keys that a tile reaches")
    return sum(pairs)


def _tile(library: ctypes.CDLL) -> tuple[int, int]:
    """Rows and columns of a tile of queries: as many as this CPU's vectors have lanes."""
    rows, columns = (
        ctypes.c_int32.in_dll(library, name).value for name in ("tile_rows", "tile_columns")
    )
    return rows, columns


def _share(rows: int, radius: int, tile_rows: int) -> int:
    """Rows of queries for a thread at a time: whole tiles, and some for every thread."""
    share = min(max(SHARE_ROWS, 2 * radius), math.ceil(rows / torch.get_num_threads()))
    return math.ceil(share / tile_rows) * tile_rows


def executed_pairs(window: Window, head_dim: int) -> int:
    """(image query, key) pairs of a head that the kernel computes, masked ones too."""
    library = _library(head_dim)
    assert isinstance(library, ctypes.CDLL), library
    rows, columns = _tile(library)
    radius, reach = window.disc_radius, window.disc_radius - 1
    tiles = range(0, window.width, columns)
    start, stop = window.image_query_rows

    @functools.cache
    def row_keys(distance: int) -> int:
        """Keys of a row so far from the tiles of a row."""
        half = math.isqrt(radius**2 - distance**2 - 1)
        return sum(min(window.width, x + columns + half) - max(0, x - half) for x in tiles)

    keys = 0
    for y in range(start, stop, rows):
        last = min(y + rows, stop) - 1
        keys += len(tiles) * (window.text_length + window.pooled_length)
        for key_y in range(max(0, y - reach), min(window.height, last + reach + 1)):
            keys += row_keys(max(0, y - key_y, key_y - last))
    return keys * rows * columns
