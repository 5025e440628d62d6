"""Which keys a query tile sees of far keys, and which query tiles see a tile of keys: flat lists.

Far keys (see ../cells.py) are tokens and cells of every level. What a query tile sees of them is
listed key by key: near the tile's own tokens the rings of cells are too thin for tiles of keys.
Rows and columns are apart: the least and the largest distance of a tile from a cell along either
axis bound those of their tokens. A list of keys holds first those that every query of the tile
sees (no mask), then the others; tokens come last, so that what fills up a list's last step is not
among the cells. Lists grow as the image does: 2.3 million entries at 8192 px with a radius of 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from ..cells import ENDLESS, cell_count, compared_centres, compared_reach2, comparisons
from ..opaque import Geometry
from ..window import Window
from .geometry import Tiling
from .resident import resident

# Pairs of a tile and a candidate that are looked at together: bounds the memory of building.
CANDIDATES = 2**23


@dataclass(frozen=True)
class KeyLists:
    """Listed keys of every query tile, as int32 tensors on one device.

    A key's number is its place among the image's given tokens, or, plus their number, its place
    among the pooled keys.

    Attributes:
        keys: (n,), numbers of keys, tile after tile.
        ranges: (tiles, 3), where a list begins, where its masked part begins (whole steps after)
            and where it ends in `keys`; tiles in raster order.
        tokens: (tiles,), how many of a list are tokens.
    """

    keys: torch.Tensor
    ranges: torch.Tensor
    tokens: torch.Tensor


@dataclass(frozen=True)
class QueryLists:
    """Listed query tiles of every tile of one level's cells, as int32 tensors on one device.

    Attributes:
        tiles: (n,), numbers of query tiles in raster order.
        ranges: (owners + 1,), where a list begins in `tiles`, and where the next does.
        longest: entries of the longest list.
    """

    tiles: torch.Tensor
    ranges: torch.Tensor
    longest: int


class _Spans(NamedTuple):
    """Stretches of an axis, in doubled tokens: of queries, or of the centres of cells.

    inner, outer: (2, stretches), first and last, for the comparison with a cell's own centre and
    with that of the cell around it; alike for queries.
    """

    inner: np.ndarray
    outer: np.ndarray


def _query_spans(start: int, stop: int, tile: int) -> _Spans:
    first = np.arange(start, stop, tile, dtype=np.int32)
    ends = 2 * np.stack([first, np.minimum(first + tile, stop) - 1])
    return _Spans(ends, ends)


def _cell_spans(length: int, levels: int, level: int, given: tuple[int, int], tile: int) -> _Spans:
    """Of `tile` cells each; cells `given` of an axis of `length` tokens."""
    start, stop = given
    own, around = (each.numpy() for each in compared_centres(length, levels, level, "cpu"))
    first = np.arange(start, stop, tile)
    ends = np.stack([first, np.minimum(first + tile, stop) - 1])
    return _Spans(own[ends], around[ends])


class _Candidates(NamedTuple):
    """Of every owner along one axis, (owners, candidates): a run of stretches within reach.

    number: of the stretch; near, far: least and largest squared distance, of the inner and of the
    outer comparison. Where a run is shorter, a stretch that nobody sees.
    """

    number: np.ndarray
    inner_near: np.ndarray
    inner_far: np.ndarray
    outer_near: np.ndarray
    outer_far: np.ndarray


def _reach2(geometry: Geometry, level: int) -> tuple[int, int]:
    return compared_reach2(geometry.radius, geometry.far_levels, level)


def _candidates(owners: _Spans, visited: _Spans, outer2: int) -> _Candidates:
    def distances(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        (first, last), (other_first, other_last) = one[:, :, None], other[:, None, :]
        near = np.maximum(other_first - last, first - other_last).clip(0)
        far = np.maximum(other_last - first, last - other_first)
        return near**2, far**2

    inner, outer = distances(owners.inner, visited.inner), distances(owners.outer, visited.outer)
    within = outer[0] < outer2
    count = within.sum(1)
    place = np.arange(count.max(initial=0))
    index = within.argmax(1)[:, None] + place if count.any() else np.zeros((len(count), 0), int)
    real = place < count[:, None]
    index = np.where(real, index, 0)
    taken = [np.take_along_axis(each, index, 1) for each in (*inner, *outer)]
    # Below any square: such a stretch is never beyond the inner reach.
    for each in taken[:2]:
        each[~real] = -ENDLESS
    return _Candidates(index, *taken)


def _seen(
    rows: _Candidates, columns: _Candidates, geometry: Geometry, level: int
) -> tuple[np.ndarray, np.ndarray]:
    """Where some query may see some cell, and where all see all: bool (owners, candidates)."""
    inner2, outer2 = _reach2(geometry, level)

    def both(name: str) -> np.ndarray:
        y, x = getattr(rows, name), getattr(columns, name)
        owners = y.shape[0] * x.shape[0]
        return (y[:, None, :, None] + x[None, :, None, :]).reshape(owners, -1)

    some = (both("outer_near") < outer2) & (both("inner_far") >= inner2)
    every = (both("outer_far") < outer2) & (both("inner_near") >= inner2)
    return some, every


def first_keys(geometry: Geometry) -> list[int]:
    """Number of the first key of every level, tokens first, and of all keys; see `KeyLists`."""
    found = [0]
    for level in range(geometry.far_levels + 1):
        start, stop = geometry.given_rows(level)
        found.append(found[-1] + (stop - start) * cell_count(geometry.width, level))
    return found


def key_lists(
    geometry: Geometry, rows: int, columns: int, step: int, device: torch.device
) -> KeyLists:
    """The keys that tiles of rows x columns queries see, but for the text.

    geometry: as `of_lists` gives it.
    step: keys that are visited together.

    A pure function of its arguments; kept on the device, because a model asks once per layer and
    step.
    """
    return resident(_key_lists, (geometry, rows, columns, step), device)


def _key_lists(geometry: Geometry, rows: int, columns: int, step: int) -> KeyLists:
    start, stop, width, levels = (
        geometry.query_start, geometry.query_stop, geometry.width, geometry.far_levels
    )  # fmt: skip
    queries_y, queries_x = _query_spans(start, stop, rows), _query_spans(0, width, columns)
    first = first_keys(geometry)
    order = [*range(1, levels + 1), 0]
    found = {}
    for level in order:
        (_, outer2), given = _reach2(geometry, level), geometry.given_rows(level)
        cells_x = _cell_spans(width, levels, level, (0, cell_count(width, level)), 1)
        cells_y = _cell_spans(geometry.height, levels, level, given, 1)
        found[level] = (
            _candidates(queries_y, cells_y, outer2),
            _candidates(queries_x, cells_x, outer2),
        )
    sizes = [found[level][0].number.shape[1] * found[level][1].number.shape[1] for level in order]
    tiles_y, tiles_x = queries_y.inner.shape[1], queries_x.inner.shape[1]
    together = max(1, CANDIDATES // (tiles_x * max(1, sum(sizes))))
    keys, counts = [], []
    for top in range(0, tiles_y, together):
        parts = []
        for level in order:
            every_row, across = found[level]
            down = _Candidates(*(each[top : top + together] for each in every_row))
            some, every = _seen(down, across, geometry, level)
            numbers = first[level] + down.number * cell_count(width, level)
            number = numbers[:, None, :, None] + across.number[None, :, None, :]
            parts.append((some & every, some & ~every, number.reshape(some.shape).astype(np.int32)))
        whole, partial, number = (np.concatenate(each, axis=1) for each in zip(*parts, strict=True))
        tokens = (whole | partial)[:, sum(sizes[:-1]) :].sum(1)
        seen = np.stack([whole, partial], axis=1)
        keys.append(np.broadcast_to(number[:, None], seen.shape)[seen])
        counts.append(np.column_stack([seen.sum(2), tokens]))
    whole, partial, tokens = np.concatenate(counts).T
    ends = np.cumsum(whole + partial)
    begins = ends - whole - partial
    ranges = np.column_stack([begins, begins + whole // step * step, ends])
    return KeyLists(*_tensors((np.concatenate(keys), ranges, tokens)))


def query_lists(geometry: Geometry, level: int, tiling: Tiling, device: torch.device) -> QueryLists:
    """The query tiles that see tiles of a level's cells, or of tokens for level 0.

    geometry: as `of_lists` gives it, all rows given and queries.
    tiling: tiles of cells, and of queries that are visited.
    """
    return resident(_query_lists, (geometry, level, tiling), device)


def _query_lists(geometry: Geometry, level: int, tiling: Tiling) -> QueryLists:
    levels, (_, outer2) = geometry.far_levels, _reach2(geometry, level)
    axes = []
    for length, tile, step in (
        (geometry.height, tiling.rows, tiling.step_rows),
        (geometry.width, tiling.columns, tiling.step_columns),
    ):
        cells = _cell_spans(length, levels, level, (0, cell_count(length, level)), tile)
        axes.append(_candidates(cells, _query_spans(0, length, step), outer2))
    rows, columns = axes
    together = max(1, CANDIDATES // max(1, columns.number.size * rows.number.shape[1]))
    tiles_x = -(-geometry.width // tiling.step_columns)
    tiles, counts = [], []
    for top in range(0, len(rows.number), together):
        some_rows = _Candidates(*(each[top : top + together] for each in rows))
        some, _ = _seen(some_rows, columns, geometry, level)
        number = some_rows.number[:, None, :, None] * tiles_x + columns.number[None, :, None, :]
        tiles.append(number.reshape(some.shape)[some])
        counts.append(some.sum(1))
    count = np.concatenate(counts)
    ranges = np.concatenate([[0], np.cumsum(count)])
    listed, ranges_ = _tensors((np.concatenate(tiles), ranges))
    return QueryLists(listed, ranges_, int(count.max()))


def key_comparisons(geometry: Geometry, device: torch.device) -> torch.Tensor:
    """The numbers of `Comparisons` of every key, in the order of `KeyLists`: int32 (6, keys)."""
    return resident(_key_comparisons, (geometry,), device).numbers


@dataclass(frozen=True)
class _KeyComparisons:
    numbers: torch.Tensor


def _key_comparisons(geometry: Geometry) -> _KeyComparisons:
    levels = [
        torch.stack(
            comparisons(
                geometry.height, geometry.width, geometry.radius, geometry.far_levels, level,
                geometry.given_rows(level),
            )
        )
        for level in range(geometry.far_levels + 1)
    ]  # fmt: skip
    return _KeyComparisons(torch.cat(levels, dim=1))


def of_lists(geometry: Geometry) -> Geometry:
    """The same geometry for all that have the same lists."""
    return geometry._replace(scale=1.0, text_length=0)


def _tensors(arrays: Sequence[np.ndarray]) -> list[torch.Tensor]:
    return [torch.from_numpy(each.astype(np.int32)) for each in arrays]


def executed_far_keys(window: Window, tiling: Tiling, step: int) -> tuple[float, float]:
    """Tokens, and cells, that a program computes for each image query, the mean over the image.

    Masked ones and queries beyond the border are included. What fills up a list's last step is
    counted as tokens, which come last.
    """
    geometry = of_lists(Geometry.of(window, 1.0))
    lists = key_lists(geometry, tiling.rows, tiling.columns, step, torch.device("cpu"))
    listed = (lists.ranges[:, 2] - lists.ranges[:, 0]).long()
    steps = (-(-listed // step)).sum().item()
    cells = (listed - lists.tokens).sum().item()
    queries = tiling.rows * tiling.columns / window.image_length
    return (steps * step - cells) * queries, cells * queries
