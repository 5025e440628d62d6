"""Keys of a tile as a list: the tokens, and cells of all levels, that its queries may see.

It serves far keys, whose rings are rectangles with a hole, and keys of some rows. What a band
reaches is copied once, level after level; every tile gathers its list from there.

Below: T tiles, Q queries of a tile, K keys of the longest list, H heads, D channels.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..cells import Comparisons, cell_count, comparisons, rows_in_reach
from ..opaque import Geometry
from ..window import Window
from .tiles import TILE_COLUMNS, Band, bands, tile_columns
from .views import Group, Rectangles

# Elements of the keys, or of the masks, of the tiles that are computed in one call.
GROUP_ELEMENTS = 2**21
# Image queries times radius squared up to which lists are remembered: some 30 MiB, most of it mask.
REMEMBERED = 2**18
# Score of the key of zeros that ends every list: who sees nothing else has output 0, not NaN.
NOTHING = -1e30


def by_lists(geometry: Geometry) -> bool:
    """Whether tiles take their keys by lists, because rectangles would not fit."""
    return geometry.far_levels > 0


def keys_of_tiles(
    geometry: Geometry, bias: torch.Tensor, elements: int, dtype: torch.dtype
) -> Rectangles | KeyLists:
    """The way to the keys of tiles.

    Args:
        bias: (pooled, heads of the query), added to the scores of pooled keys.
        elements: of a key, H * D.
        dtype: of masks.
    """
    if by_lists(geometry):
        return KeyLists(geometry, bias, elements, dtype)
    return Rectangles(geometry.width, geometry.radius, dtype, bias.device)


def executed_tile_pairs(window: Window) -> int:
    """(query, key) pairs these tiles compute, masked ones too; see `attended_pairs`."""
    columns, geometry = tile_columns(window.width, window.disc_radius), Geometry.of(window, 1.0)
    start, stop = window.image_query_rows
    image, tile_keys = (stop - start) * columns.query_width, 0
    for band in bands(window.height, window.disc_radius, range(start, stop)):
        if by_lists(geometry):
            lists = find_lists(geometry, band.start, band.stop, torch.float32, torch.device("cpu"))
            keys = lists.places.numel()
        else:
            keys = columns.count * columns.key_length * (band.key_stop - band.key_start)
        tile_keys += keys * (band.stop - band.start)
    dense = window.text_length + (0 if window.far_levels else window.pooled_length)
    text = window.text_query_length * window.key_length
    return text + dense * image + tile_keys * TILE_COLUMNS


class Lists(NamedTuple):
    """Those of a band's tiles.

    Attributes:
        tokens: what the band reaches, as a slice of the given image tokens.
        cells: of every level, as slices of the pooled keys.
        places: int64 (T, K), in the copy of tokens, cells, and a last key of zeros.
        mask: (T, 1, Q, K), added to the scores: 0 where a query sees the key, else -inf.
    """

    tokens: slice
    cells: tuple[slice, ...]
    places: torch.Tensor
    mask: torch.Tensor


class KeyLists:
    """Keys of tiles by lists; see `Rectangles` for the other way."""

    def __init__(
        self, geometry: Geometry, bias: torch.Tensor, elements: int, dtype: torch.dtype
    ) -> None:
        """See `keys_of_tiles`."""
        every_head = not len(bias) or bias.stride(1) == 0
        self._bias = (bias[:, :1] if every_head else bias).to(dtype)
        self._elements = elements
        self._kept: tuple[Band, Group] | None = None
        few = geometry.image_queries * geometry.radius**2 <= REMEMBERED
        find = _remembered_lists if few else find_lists
        shape = geometry._replace(scale=0.0, text_length=0)
        # Asked for several times for a band before the next one.
        self._lists = functools.lru_cache(maxsize=1)(
            lambda band: find(shape, band.start, band.stop, dtype, bias.device)
        )

    def copy(
        self, image: torch.Tensor, pooled: torch.Tensor, band: Band, dtype: torch.dtype
    ) -> torch.Tensor:
        """What a band reaches of image (tokens, H, D) and pooled keys, and zeros: (keys, H, D)."""
        lists = self._lists(band)
        parts = [image[lists.tokens], *(pooled[cells] for cells in lists.cells)]
        zeros = image.new_zeros(1, *image.shape[1:], dtype=dtype)
        return torch.cat([*(part.to(dtype) for part in parts), zeros])

    def add_copy(
        self, image: torch.Tensor, pooled: torch.Tensor, band: Band, copy: torch.Tensor
    ) -> None:
        """Adjoint of `copy`."""
        lists, start = self._lists(band), 0
        for whole, rows in ((image, lists.tokens), *((pooled, cells) for cells in lists.cells)):
            stop = start + rows.stop - rows.start
            whole[rows] += copy[start:stop]
            start = stop

    def groups(self, band: Band) -> Iterator[Group]:
        """Groups of a band's tiles; a single one is kept for the other items of the batch."""
        if self._kept is not None and self._kept[0] == band:
            yield self._kept[1]
            return
        lists = self._lists(band)
        of_tokens = self._bias.new_zeros(1, 1).expand(lists.tokens.stop, self._bias.shape[1])
        bias = self.copy(of_tokens, self._bias, band, self._bias.dtype)
        tiles, _, queries, keys = lists.mask.shape
        step = max(1, GROUP_ELEMENTS // (keys * max(self._elements, queries * bias.shape[1])))
        for start in range(0, tiles, step):
            own = slice(start, min(start + step, tiles))
            places = lists.places[own]
            mask = lists.mask[own] + bias[places].transpose(1, 2).unsqueeze(2)
            group = Group(range(own.start, own.stop), mask, places)
            if step >= tiles:
                self._kept = band, group
            yield group

    def take(self, copy: torch.Tensor, group: Group) -> torch.Tensor:
        """Keys of some tiles, (tiles, H, K, D), from a copy."""
        assert group.places is not None
        found = copy.index_select(0, group.places.flatten())
        return found.unflatten(0, group.places.shape).transpose(1, 2)

    def add(self, copy: torch.Tensor, group: Group, part: torch.Tensor) -> None:
        """Adjoint of `take`."""
        assert group.places is not None
        copy.index_add_(
            0, group.places.flatten(), part.transpose(1, 2).flatten(0, 1).to(copy.dtype)
        )


def find_lists(
    geometry: Geometry, start: int, stop: int, dtype: torch.dtype, device: torch.device
) -> Lists:
    """The lists of a band, its rows of queries from `start` to before `stop`."""
    width = geometry.width
    first_x = torch.arange(0, width, TILE_COLUMNS, dtype=torch.int32, device=device)[:, None]
    last_x = (first_x + TILE_COLUMNS - 1).clamp(max=width - 1)
    slices, place, compared = _candidates(geometry, range(start, stop), (first_x, last_x))
    may = place >= 0

    # Which candidate is at each place of each list; the last column of candidates is nothing.
    longest = int(may.sum(1).max()) + 1
    chosen = torch.full((len(may), longest), may.shape[1] - 1, device=device)
    tile, candidate = may.nonzero(as_tuple=True)
    chosen[tile, may.cumsum(1)[tile, candidate] - 1] = candidate
    place = place.gather(1, chosen)
    compared = Comparisons(*(x.gather(1, chosen)[:, None, None] for x in compared))
    y = torch.arange(start, stop, dtype=torch.int32, device=device)[:, None]
    # Queries beyond the right border see what the last column does, so that they stay finite.
    x = torch.minimum(first_x + torch.arange(TILE_COLUMNS, device=device), last_x)
    seen = compared.seen(y, x[:, :, None, None]).flatten(1, 2)  # (T, Q, K)
    mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))
    mask.masked_fill_(place[:, None] < 0, NOTHING)
    copied = sum(rows.stop - rows.start for rows in slices)
    tokens, *cells = slices
    return Lists(tokens, tuple(cells), place.masked_fill(place < 0, copied), mask[:, None])


_remembered_lists = functools.lru_cache(maxsize=128)(find_lists)


def _candidates(
    geometry: Geometry, queries: range, x: tuple[torch.Tensor, torch.Tensor]
) -> tuple[list[slice], torch.Tensor, Comparisons]:
    """What tiles may see of the given keys, one level after the other.

    Args:
        queries: rows of the band.
        x: first and last column of each tile, (T, 1).

    Returns:
        What the band reaches: slices of the tokens, and of the pooled keys for every level seen.
        And (T, candidates) each: the place among all of these together, -1 for what is not seen,
        as the last one; what decides who sees it.
    """
    height, width, _, radius, *_ = geometry
    levels, device, y = geometry.far_levels, x[0].device, (queries.start, queries.stop - 1)
    slices, places, compared = [], [], []
    copied = 0
    for level in range(levels + 1):
        columns, rows = cell_count(width, level), geometry.rows_in_reach(level, queries)
        spans = _columns_in_reach(width, radius, levels, level)
        start, stop = torch.tensor(spans, device=device).T[..., None]
        column = start + torch.arange(max(stop - start for start, stop in spans), device=device)
        first_of_row = torch.arange(len(rows), device=device)[:, None] * columns
        place = (first_of_row + column.clamp(max=columns - 1)[:, None]).flatten(1)
        own = comparisons(height, width, radius, levels, level, (rows.start, rows.stop), device)
        own = Comparisons(*(values[place] for values in own))
        may = (column < stop).repeat(1, len(rows)) & _may_be_seen(own, y, x)
        if level and not may.any():
            continue
        first = geometry.first_cell(level) - geometry.given_rows(level)[0] * columns
        slices.append(slice(first + rows.start * columns, first + rows.stop * columns))
        places.append((place + copied).masked_fill(~may, -1))
        compared.append(own)
        copied += len(rows) * columns
    every = Comparisons(
        *(F.pad(torch.cat(part, 1), (0, 1)) for part in zip(*compared, strict=True))
    )
    return slices, F.pad(torch.cat(places, 1), (0, 1), value=-1), every


@functools.lru_cache(maxsize=256)
def _columns_in_reach(
    width: int, radius: int, levels: int, level: int
) -> tuple[tuple[int, int], ...]:
    """(first, one after the last) column of a level that each tile's queries may see."""
    tiles = (range(x, min(x + TILE_COLUMNS, width)) for x in range(0, width, TILE_COLUMNS))
    found = (rows_in_reach(width, radius, levels, level, tile) for tile in tiles)
    return tuple((columns.start, columns.stop) for columns in found)


def _may_be_seen(
    keys: Comparisons,
    y: tuple[int, int],
    x: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Whether, of queries in rectangles, one is far enough and one near enough: few more than seen.

    y, x: first and last, (T, 1) or a number, of the queries; the keys are (T, K).
    """

    def farthest(first: int | torch.Tensor, last: int | torch.Tensor, centre: torch.Tensor):
        return torch.maximum((2 * first - centre).abs(), (2 * last - centre).abs())

    def nearest(first: int | torch.Tensor, last: int | torch.Tensor, centre: torch.Tensor):
        return torch.maximum(2 * first - centre, centre - 2 * last).clamp(min=0)

    inner = farthest(*y, keys.inner_y) ** 2 + farthest(*x, keys.inner_x) ** 2
    outer = nearest(*y, keys.outer_y) ** 2 + nearest(*x, keys.outer_x) ** 2
    return (inner >= keys.inner2) & (outer < keys.outer2)
