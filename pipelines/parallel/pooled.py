"""Pooled keys and values of a shared image: a rank pools its rows, and gets what its queries see.

Pooling is linear: cells that lie in several bands are sums of what their ranks contribute. Such
parts travel in float32, so that the sum is rounded once, as on one process; whole cells travel in
the dtype of the keys. Everything is started when made and waited for by `wait`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist

from clear_dit.kernels.pooling import pool_cell_rows, pool_rows
from clear_dit.kernels.window import Window

from .bands import Bands, common
from .exchange import Gathered, Traffic

KeyValue = tuple[torch.Tensor, torch.Tensor]


class PooledTokens:
    """The pooled tokens of `down_factor`, which all queries see: every rank gathers all of them.

    Args:
        key, value: (batch, own rows * width, heads, head_dim), of this rank's band.
        spatial_weight: as in `local_attention`.
        window: of the whole image.
    """

    def __init__(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        spatial_weight: torch.Tensor | None,
        window: Window,
        bands: Bands,
        group: dist.ProcessGroup,
        traffic: Traffic,
    ) -> None:
        factor = window.down_factor
        parts = [pool_rows(x, window, spatial_weight, bands.own) for x in (key, value)]
        pooled = torch.cat(parts).unflatten(1, (-1, math.ceil(window.width / factor)))
        self._rows = math.ceil(window.height / factor)
        self._of_rank = [_rows_of_cells(bands.of(rank), factor) for rank in range(bands.ranks)]
        padded = pooled.new_zeros(len(pooled), max(map(len, self._of_rank)), *pooled.shape[2:])
        padded[:, : pooled.shape[1]] = pooled
        if not _are_cut(self._of_rank):
            padded = padded.to(key.dtype)
        self._dtype = key.dtype
        self._gathered = Gathered(padded, group, traffic, "pooled")

    def wait(self) -> KeyValue:
        """Pooled key and value of the whole image, (batch, pooled, heads, head_dim)."""
        parts = self._gathered.wait()
        whole = parts[0].new_zeros(len(parts[0]), self._rows, *parts[0].shape[2:])
        for rows, part in zip(self._of_rank, parts, strict=True):
            whole[:, rows.start : rows.stop] += part[:, : len(rows)]
        key, value = whole.flatten(1, 2).to(self._dtype).chunk(2)
        return key, value


@dataclass(frozen=True)
class CellBands:
    """Whose rows of a level's cells are whose, as `Bands` says it of tokens.

    Attributes:
        made: by rank, the rows of cells that have tokens of its band: it makes a part of them.
        seen: by rank, the rows of cells that its queries may see.
    """

    made: list[range]
    seen: list[range]

    @classmethod
    def of(cls, window: Window, bands: Bands, level: int) -> CellBands:
        """Those of a level of far keys; window and bands are the whole image's."""
        rows = [bands.of(rank) for rank in range(bands.ranks)]
        return cls(
            [_rows_of_cells(own, 2**level) for own in rows],
            [window.rows_in_reach(level, own) for own in rows],
        )

    @property
    def are_cut(self) -> bool:
        """Whether a row of cells has tokens of several ranks."""
        return _are_cut(self.made)

    def sent(self, source: int, to: int) -> range:
        """The rows of cells of which one rank sends its part to another; maybe none."""
        return common(self.made[source], self.seen[to])


class FarCells:
    """The far keys that this rank's queries may see, on their way, and its parts of others'.

    Of every level that is about as many rows of cells above and below the band as the halo has rows
    of tokens, whatever the number of ranks. A rank gets one message from every other that has some.

    Args:
        key, value: (batch, own rows * width, heads, head_dim), of this rank's band.
        weight: (far_levels or more, 2, 2), of cells' children; see `pool_cells`.
        window: of the whole image.
        cells: level by level, from 1.
    """

    def __init__(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        weight: torch.Tensor | None,
        window: Window,
        bands: Bands,
        cells: list[CellBands],
        group: dist.ProcessGroup,
        traffic: Traffic,
    ) -> None:
        self._rank, self._dtype, self._traffic = bands.rank, key.dtype, traffic
        sizes = window.height, window.width, window.far_levels
        made = [pool_cell_rows(x, weight, *sizes, bands.own) for x in (key, value)]
        parts = [
            part if level.are_cut else part.to(key.dtype)
            for part, level in zip(map(torch.cat, zip(*made, strict=True)), cells, strict=True)
        ]
        # The coarsest first: in a message the wider numbers then lie on multiples of their size.
        self._cells = cells[::-1]
        self._sums = [
            part.new_zeros(len(part), len(level.seen[bands.rank]), *part.shape[2:])
            for part, level in zip(parts[::-1], self._cells, strict=True)
        ]

        def parts_for(rank: int) -> list[torch.Tensor]:
            return [
                _rows(part, level.made[bands.rank], level.sent(bands.rank, rank))
                for part, level in zip(parts[::-1], self._cells, strict=True)
            ]

        self._add(bands.rank, parts_for(bands.rank))
        others = [rank for rank in range(bands.ranks) if rank != bands.rank]
        self._outgoing = [
            (rank, torch.cat([part.flatten().view(torch.uint8) for part in parts_for(rank)]))
            for rank in others
        ]
        self._incoming = [
            (rank, key.new_empty(sum(self._bytes_from(rank)), dtype=torch.uint8)) for rank in others
        ]
        traffic.sent["far"] += sum(message.nbytes for _, message in self._outgoing)
        operations = [
            dist.P2POp(operation, message, group=group, group_peer=rank)
            for operation, messages in ((dist.isend, self._outgoing), (dist.irecv, self._incoming))
            for rank, message in messages
            if len(message)
        ]
        self._works = dist.batch_isend_irecv(operations) if operations else []

    def _bytes_from(self, source: int) -> list[int]:
        """Of each level in a message."""
        return [
            len(level.sent(source, self._rank)) * sums[:, :1].nbytes
            for level, sums in zip(self._cells, self._sums, strict=True)
        ]

    def _add(self, source: int, parts: list[torch.Tensor]) -> None:
        for level, sums, part in zip(self._cells, self._sums, parts, strict=True):
            target = _rows(sums, level.seen[self._rank], level.sent(source, self._rank))
            target += part.view(sums.dtype).view(target.shape)

    def wait(self) -> KeyValue:
        """Key and value of the cells, (batch, cells, heads, head_dim): level after level, from 1.

        Of every level the rows that are seen, in raster order.
        """
        with self._traffic.wait():
            for work in self._works:
                work.wait()
        for rank, message in self._incoming:
            self._add(rank, list(message.split(self._bytes_from(rank))))
        cells = [sums.flatten(1, 2).to(self._dtype) for sums in self._sums[::-1]]
        key, value = torch.cat(cells, dim=1).chunk(2)
        return key, value


def _rows_of_cells(tokens: range, side: int) -> range:
    """The rows of cells of so many tokens that have some of these rows of tokens."""
    return range(tokens.start // side, math.ceil(tokens.stop / side))


def _are_cut(rows: list[range]) -> bool:
    return any(above.stop > below.start for above, below in pairwise(rows))


def _rows(cells: torch.Tensor, held: range, wanted: range) -> torch.Tensor:
    """A view of some of the rows that a tensor (batch, rows, ...) holds."""
    return cells[:, wanted.start - held.start : wanted.stop - held.start]
