"""CLEAR attention of one rank's band of an image: what all ranks together compute is exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.weak import WeakTensorKeyDictionary

from clear_dit.attention.layout import Layout
from clear_dit.attention.norm_rope import Rotary
from clear_dit.attention.text_padding import Projected
from clear_dit.kernels.attention import local_attention
from clear_dit.kernels.cells import levels_needed
from clear_dit.kernels.dense import dense_attention
from clear_dit.kernels.merge import merge_
from clear_dit.kernels.two_positions import Part, Scaled, attend_part_by_part
from clear_dit.kernels.window import Window

from .bands import Bands, Piece, common
from .exchange import Gathered, HaloRows, MergedText, Traffic
from .pooled import CellBands, FarCells, KeyValue, PooledTokens


class SharedImage:
    """An image of one layout whose rows the ranks of a group share; `tracker.share` of its layers.

    Text, and reference images, are on every rank ("text" below means both). A layer's queries of
    this rank's rows attend to the text, to their discs (the halo comes from the neighbours) and to
    the pooled tokens of the whole image, or to near tokens and the far keys beyond; text queries
    attend to all, by way of `MergedText`.

    Args:
        whole: the image, in tokens.
        radius, down_factor, far_levels: of the window.
        group: its ranks, from the top of the image to the bottom.
        traffic: counts what is sent.
        keeps_halos: whether every layer's halo is kept for the next step, where `stale` may be set.

    Attributes:
        forward_pass: which of a step's forward passes is under way, from 0.
        stale: whether layers use the halo of the step before; this step's then travels meanwhile.
    """

    def __init__(
        self,
        whole: Layout,
        radius: int,
        down_factor: int,
        far_levels: int,
        group: dist.ProcessGroup,
        traffic: Traffic,
        keeps_halos: bool = False,
    ) -> None:
        self.whole = whole
        # Cells that nobody sees need not travel.
        levels = min(far_levels, levels_needed(whole.rows, whole.columns, radius))
        self.window: Window = Window(
            whole.rows, whole.columns, 0, radius, down_factor, far_levels=levels
        )
        self.bands: Bands = Bands(whole.rows, group.size(), group.rank(), self.window.reach)
        self.layout: Layout = whole._replace(rows=len(self.bands.own))
        self.group = group
        self.traffic = traffic
        self.forward_pass = 0
        self.stale = False
        self._tables: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._cells = [
            CellBands.of(self.window, self.bands, level) for level in range(1, levels + 1)
        ]
        # An implementation may keep a mask on its window: always the same one for a piece.
        self._windows: dict[tuple[Piece, int], Window] = {}
        self._keeps_halos = keeps_halos
        self._kept: dict[tuple[int, Any], HaloRows] = {}

    @property
    def elsewhere(self) -> int:
        """Image tokens of the other ranks."""
        return self.whole.image_length - self.layout.image_length

    def own_part(self, tokens: torch.Tensor, image_last: bool = False) -> torch.Tensor:
        """(batch, image + references, ...) without the image tokens of other ranks.

        Args:
            image_last: whether what is there besides stands before the image.
        """
        own, columns, length = self.bands.own, self.whole.columns, self.whole.image_length
        start = tokens.shape[1] - length if image_last else 0
        before, image, behind = tokens.tensor_split([start, start + length], dim=1)
        image = image[:, own.start * columns : own.stop * columns]
        return torch.cat([before, image, behind], dim=1)

    def whole_image(self, tokens: torch.Tensor, image_last: bool = False) -> torch.Tensor:
        """The reverse of `own_part`, on every rank."""
        own = self.layout.image_length
        start = tokens.shape[1] - own if image_last else 0
        before, image, behind = tokens.tensor_split([start, start + own], dim=1)
        room = self.bands.largest * self.whole.columns
        padded = tokens.new_zeros(tokens.shape[0], room, tokens.shape[2])
        padded[:, :own] = image
        parts = Gathered(padded, self.group, self.traffic, "image").wait()
        lengths = [len(self.bands.of(rank)) * self.whole.columns for rank in range(len(parts))]
        images = [part[:, :length] for part, length in zip(parts, lengths, strict=True)]
        return torch.cat([before, *images, behind], dim=1)

    def tables(
        self, key: torch.Tensor, make: Callable[[], list[Rotary]]
    ) -> tuple[list[Rotary], Rotary]:
        """A rotary table's rows of this rank, position by position, and those of its halo.

        Remembered for the forward under way, whose layers share the table.

        Args:
            key: a tensor of the table.
            make: the tables of the whole sequence by position, the true ones first; (..., tokens,
                channels) each, the image's tokens last.
        """
        found = self._tables.get(key)
        if found is None:
            above, below = self.bands.halo(self.bands.rank)

            def rows(table: torch.Tensor, part: range) -> torch.Tensor:
                columns, length = self.whole.columns, self.whole.image_length
                image = table[..., table.shape[-2] - length :, :]
                return image[..., part.start * columns : part.stop * columns, :]

            def own(table: torch.Tensor) -> torch.Tensor:
                first = table.shape[-2] - self.whole.image_length
                return torch.cat([table[..., :first, :], rows(table, self.bands.own)], dim=-2)

            positions = make()
            # Keys of the halo are near ones: their true positions will do.
            found = self._tables[key] = (
                [tuple(map(own, tables)) for tables in positions],
                tuple(
                    torch.cat([rows(table, above), rows(table, below)], dim=-2)
                    for table in positions[0]
                ),
            )
        return found

    def begin_forward(self) -> None:
        """Forget the tables of the forward before."""
        self._tables.clear()

    def send(self, layer: Any, hidden_states: torch.Tensor) -> HaloRows:
        """Start the exchange of a layer's halo; with stale halos return what came a step before.

        Args:
            layer: the attention module.
            hidden_states: (batch, ... + own rows * width, channels), from which a rank makes key
                and value of the rows: the layer's input.
        """
        self.traffic.layers += 1
        tokens = hidden_states[:, hidden_states.shape[1] - self.layout.image_length :]
        rows = HaloRows(tokens, self.bands, self.whole.columns, self.group, self.traffic)
        if not self._keeps_halos:
            return rows
        previous = self._kept.get((self.forward_pass, layer))
        self._kept[self.forward_pass, layer] = rows
        return previous if self.stale and previous is not None else rows

    def forget_halos(self) -> None:
        """Drop what was kept: another image begins."""
        for rows in self._kept.values():
            rows.wait()
        self._kept.clear()

    def attend(
        self,
        tensors: Projected,
        scaled: Scaled | None,
        arrived: Callable[[], KeyValue],
        *,
        scale: float,
        spatial_weight: torch.Tensor | None,
        far_offset: torch.Tensor | None,
        impl: str,
    ) -> torch.Tensor:
        """What `local_attention` gives the text and this rank's rows in the whole image.

        Args:
            tensors: query, key and value, (batch, text + own rows * width, heads, head_dim) each.
                Text here is whatever all ranks have and every query sees, maybe nothing; the query
                may be the image's alone.
            scaled: query and key again, rotated by scaled positions, where tokens have two (see
                `two_position_attention`).
            arrived: key and value of the halo, (batch, tokens, heads, head_dim), made of what
                `send` returned for this layer; waits for it.
            scale, spatial_weight, far_offset, impl: as in `local_attention`.

        Returns:
            Shape and dtype of the query.
        """
        query, key, value = tensors
        own, text = self.bands.own, key.shape[1] - self.layout.image_length
        first = query.shape[1] - self.layout.image_length  # of the image's queries
        far = (query, key) if scaled is None else scaled.far()
        between = [] if scaled is None else scaled.between
        queries: list[torch.Tensor] = []

        def keys_by_levels() -> Iterator[tuple[range, torch.Tensor]]:
            """By levels of cells, as they are pooled; keeps the queries that go with them."""
            levels = [range(self.window.far_levels + 1)]
            if scaled is not None:
                levels = self.window.levels_by_position(len(between))
            rotated = (lambda: (query, key), *between, lambda: far)
            for own, rotate in zip(levels, rotated, strict=scaled is not None):
                if own:
                    by_position = rotate()
                    queries.append(by_position[0])
                    yield own, by_position[1][:, text:]

        scaled_query, scaled_key = far
        pooling = self._start_pooling(
            keys_by_levels(), scaled_key[:, text:], value[:, text:], spatial_weight, scale
        )
        merged = None
        if first:
            # The keys of the text count once.
            keys_from = 0 if self.bands.rank == 0 else text
            merged = MergedText(
                *dense_attention(
                    scaled_query[:, :first],
                    scaled_key[:, keys_from:],
                    value[:, keys_from:],
                    scale=scale,
                    impl=impl,
                ),
                self.group,
                self.traffic,
            )
        seen_by_all = [scaled_key[:, :text]], [value[:, :text]]
        cells = None
        if isinstance(pooling, FarCells):
            cells = pooling.wait()
        elif pooling is not None:
            for parts, pooled in zip(seen_by_all, pooling.wait(), strict=True):
                parts.append(pooled)
        # In front of the image's keys; apart from them where they are scored by another query.
        in_front = seen_by_all if scaled is None else ([], [])
        apart = None if scaled is None else [torch.cat(parts, dim=1) for parts in seen_by_all]
        in_common = sum(part.shape[1] for part in seen_by_all[0])
        out = torch.empty_like(query)

        def compute(piece: Piece, keys: torch.Tensor, values: torch.Tensor) -> None:
            rows = range(piece.queries.start - own.start, piece.queries.stop - own.start)
            columns = self.whole.columns
            part = slice(first + rows.start * columns, first + rows.stop * columns)
            if apart is not None and cells is not None:
                windows = self._window(piece, text).parts_by_position(len(between))
                parts = _parts(
                    windows, [each[:, part] for each in queries],
                    (keys, values), (apart[0], apart[1]), cells,
                )  # fmt: skip
                out[:, part] = attend_part_by_part(
                    parts, scale=scale, impl=impl, far_offset=far_offset
                )
                return
            attended, lse = local_attention(
                query[:, part],
                keys,
                values,
                self._window(piece, in_common if apart is None else 0),
                scale=scale,
                far_offset=far_offset,
                pooled=cells,
                impl=impl,
                return_lse=True,
            )
            if apart is not None and in_common:
                attended = attended.to(lse.dtype)
                others = dense_attention(scaled_query[:, part], *apart, scale=scale, impl=impl)
                merge_(attended, lse, *others)
            out[:, part] = attended

        inside = self.bands.interior
        if inside is not None:
            if scaled is not None:
                compute(inside, key[:, text:], value[:, text:])
            elif in_common == text:
                compute(inside, key, value)
            else:
                keys, values = (
                    torch.cat([*parts, x[:, text:]], dim=1)
                    for parts, x in zip(in_front, (key, value), strict=True)
                )
                compute(inside, keys, values)
                del keys, values
        if merged is not None:
            merged.start_sum()
        if self.bands.borders:
            of_halo = arrived()
            for piece in self.bands.borders:
                keys, values = (
                    torch.cat([*parts, *self._rows(x[:, text:], other, piece.keys)], dim=1)
                    for parts, x, other in zip(in_front, (key, value), of_halo, strict=True)
                )
                compute(piece, keys, values)
        if merged is not None:
            out[:, :first] = merged.wait()
        return out

    def _window(self, piece: Piece, in_common: int) -> Window:
        """in_common: tokens in front of the image that every query sees: text, pooled tokens."""
        if (piece, in_common) not in self._windows:
            self._windows[piece, in_common] = self._make_window(piece, in_common)
        return self._windows[piece, in_common]

    def _make_window(self, piece: Piece, in_common: int) -> Window:
        queries, keys, columns = piece.queries, piece.keys, self.whole.columns
        if not self._cells:
            # As if the rows of the keys were the whole image.
            rows = (queries.start - keys.start, queries.stop - keys.start)
            return Window(len(keys), columns, in_common, self.window.radius, query_rows=rows)
        given = [keys, *(level.seen[self.bands.rank] for level in self._cells)]
        return replace(
            self.window,
            text_length=in_common,
            query_rows=(queries.start, queries.stop),
            key_rows=tuple((rows.start, rows.stop) for rows in given),
        )

    def _rows(self, own: torch.Tensor, halo: torch.Tensor, wanted: range) -> list[torch.Tensor]:
        """Views of the wanted rows, top to bottom: of the halo above, this rank's, the halo below.

        own, halo: (batch, rows * width, ...).
        """
        columns = self.whole.columns
        above, below = self.bands.halo(self.bands.rank)
        halo_above, halo_below = halo.tensor_split([len(above) * columns], dim=1)
        found = []
        for rows, tokens in ((above, halo_above), (self.bands.own, own), (below, halo_below)):
            part = common(wanted, rows)
            if part:
                start, stop = part.start - rows.start, part.stop - rows.start
                found.append(tokens[:, start * columns : stop * columns])
        return found

    def _start_pooling(
        self,
        keys: Iterator[tuple[range, torch.Tensor]],
        scaled_key: torch.Tensor,
        value: torch.Tensor,
        weight: torch.Tensor | None,
        scale: float,
    ) -> PooledTokens | FarCells | None:
        """Start to exchange the pooled keys and values that this rank's queries see."""
        where = self.window, self.bands
        if self._cells:
            return FarCells(
                keys, value, weight, scale, *where, self._cells, self.group, self.traffic
            )
        if self.window.down_factor > 1:
            return PooledTokens(scaled_key, value, weight, *where, self.group, self.traffic)
        return None


def _parts(
    windows: tuple[Window, ...],
    queries: list[torch.Tensor],
    tokens: KeyValue,
    text: KeyValue,
    cells: KeyValue,
) -> Iterator[Part]:
    """What `attend_part_by_part` takes.

    Args:
        windows: of a piece; queries: its image queries for each of them.
        tokens, text: key and value of the image's tokens that are given, and of the text.
        cells: of the cells that are given, of all levels.
    """
    none = text[0][:, :0], text[1][:, :0]
    given = [tokens, *[none] * (len(windows) - 2), text]
    lengths = [window.pooled_length for window in windows]
    split = zip(*(each.split(lengths, dim=1) for each in cells), strict=True)
    return zip(windows, queries, given, split, strict=True)
