"""CLEAR attention by a compiled kernel, on a CPU: see forward.cpp."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import torch

from ...opaque import Geometry
from ...window import Window
from .build import BuildError, load

# A dtype's place is its number in the kernel, which computes in float32.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_HEAD_DIM = 128
# Rows and columns together: squares of distances are exact in float32.
LARGEST_GRID = 4096
# What a thread takes at a time, if there is enough for all. Rows of image queries, at least: the
# keys above and below are copied once more.
SHARE_ROWS = 32
# Text queries: the second-level cache holds their state beside some keys.
SHARE_TEXT = 256


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch", "token", "head")),
    )


class _Problem(ctypes.Structure):
    _fields_ = (
        *(
            (name, _Tensor)
            for name in ("query", "out", "lse", "key", "value", "dense_key", "dense_value")
        ),
        *(
            (name, ctypes.c_int32)
            for name in (
                *("dtype", "text_queries", "text_length", "height", "width", "radius"),
                *("query_start", "dense_length"),
            )
        ),
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
    try:
        library = load(Path(__file__).with_suffix(".cpp"), [f"HEAD_DIM={head_dim}"])
    except BuildError as error:
        return str(error)
    library.attend_share.restype = ctypes.c_int64
    library.attend_share.argtypes = ARGUMENTS
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
    geometry: Geometry,
) -> int:
    """Attention of text queries to all keys, of image queries to their disc and to dense keys.

    Args:
        query, out: (batch, text and image queries, heads, head_dim), head_dim contiguous.
        key, value: (batch, text and image tokens, heads, head_dim), head_dim contiguous.
        dense_key, dense_value: (batch, dense tokens, heads, head_dim), none or more.
        lse: (batch, text and image queries, heads), float32.
        geometry: of the window.

    Returns:
        The (query, key) pairs computed, masked ones too, over all batch items and heads. `out` and
        `lse` are written.

    Raises:
        MemoryError: no room for the rows of keys that a tile reaches.
    """
    library = _library(query.shape[-1])
    assert isinstance(library, ctypes.CDLL), library
    height, width, text_length, radius, scale, query_start, query_stop, *_ = geometry
    # The kernel believes these numbers.
    assert key.shape[1] == value.shape[1] == text_length + height * width
    assert 0 <= query_start < query_stop <= height
    dense_key, dense_value = (
        x.transpose(1, 2).to(torch.float32).contiguous().transpose(1, 2)
        for x in (dense_key, dense_value)
    )
    text_queries = query.shape[1] - geometry.image_queries
    assert text_queries >= 0
    tensors = (query, out, lse, key, value, dense_key, dense_value)
    problem = _Problem(
        *(_Tensor(x.data_ptr(), *x.stride()[:3]) for x in tensors),
        DTYPES.index(query.dtype), text_queries, text_length, height, width, radius,
        query_start, dense_key.shape[1], scale,
    )  # fmt: skip
    rows, columns = _tile(library)
    text_share = _share(text_queries, SHARE_TEXT, rows * columns)
    image_share = _share(query_stop - query_start, max(SHARE_ROWS, 2 * radius), rows)
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

    pairs = _by_threads(run, shares)
    if min(pairs, default=0) < 0:
        raise MemoryError("tiled attention: no memory for the keys that a tile reaches")
    return sum(pairs)


def _by_threads(run: Callable[[Share], int], shares: list[Share]) -> list[int]:
    """What `run` returns for each share, in any order; by this thread and new ones.

    The new ones end with this call: a process that forks takes no threads along, and an executor's
    refuse to work once the main thread has ended.
    """
    left = iter(shares)
    found: list[list[int]] = [[] for _ in range(torch.get_num_threads())]

    def work(own: list[int]) -> None:
        own.extend(map(run, left))

    others = [Thread(target=work, args=(own,)) for own in found[1:]]
    for thread in others:
        thread.start()
    work(found[0])
    for thread in others:
        thread.join()
    return [pairs for own in found for pairs in own]


def _tile(library: ctypes.CDLL) -> tuple[int, int]:
    """Rows and columns of a tile of queries: as many as this CPU's vectors have lanes."""
    rows, columns = (
        ctypes.c_int32.in_dll(library, name).value for name in ("tile_rows", "tile_columns")
    )
    return rows, columns


def _share(whole: int, wanted: int, step: int) -> int:
    """What a thread takes at a time, in whole steps: as wanted, but some for every thread."""
    share = min(wanted, math.ceil(whole / torch.get_num_threads()))
    return max(1, math.ceil(share / step)) * step


def executed_pairs(window: Window, head_dim: int) -> int:
    """(query, key) pairs of a head that the kernel computes, masked ones too."""
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

    keys = math.ceil(window.text_query_length / (rows * columns)) * window.sequence_length
    for y in range(start, stop, rows):
        last = min(y + rows, stop) - 1
        keys += len(tiles) * (window.text_length + window.pooled_length)
        for key_y in range(max(0, y - reach), min(window.height, last + reach + 1)):
            keys += row_keys(max(0, y - key_y, key_y - last))
    return keys * rows * columns
