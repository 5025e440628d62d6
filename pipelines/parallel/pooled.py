"""Pooled keys and values of a shared image: a rank pools its rows, and gets what its queries see.

Cells that lie in several bands are sums of what their ranks contribute. Such parts travel in
float32, so that the sum is rounded once, as on one process; whole cells travel in the dtype of the
keys. Far keys, whose tokens weigh by the length of their keys, need the weights of such parts
first, a few numbers that are waited for. All else is started when made and waited for by `wait`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist

from clear_dit.kernels.pooling import pool_cell_rows, pool_rows, shares
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
        seen: by rank, the rows of cells that it gets: those that its queries may see, or all.
        are_reduced: whether all ranks get all rows, by an all-reduce.
    """

    made: list[range]
    seen: list[range]
    are_reduced: bool = False

    @classmethod
    def of(cls, window: Window, bands: Bands, level: int) -> CellBands:
        """Those of a level of far keys; window and bands are the whole image's.

        Of a coarse level, whose few cells most ranks have a part of and see, an all-reduce sends
        less than messages do.
        """
        ranks = bands.ranks
        own = [bands.of(rank) for rank in range(ranks)]
        made = [_rows_of_cells(rows, 2**level) for rows in own]
        cells = cls(made, [window.rows_in_reach(level, rows) for rows in own])
        every = range(made[-1].stop)
        most = max(map(cells.rows_sent, range(ranks)))
        if cells.are_cut and 2 * (ranks - 1) * len(every) < ranks * most:
            return cls(made, [every] * ranks, are_reduced=True)
        return cells

    @property
    def are_cut(self) -> bool:
        """Whether a row of cells has tokens of several ranks."""
        return _are_cut(self.made)

    def sent(self, source: int, to: int) -> range:
        """The rows of cells of which one rank sends its part to another; maybe none."""
        return common(self.made[source], self.seen[to])

    def rows_sent(self, source: int) -> int:
        """Rows of cells that a rank sends by messages, to all others together."""
        others = (rank for rank in range(len(self.made)) if rank != source)
        return sum(len(self.sent(source, rank)) for rank in others)


class FarCells:
    """The far keys that this rank's queries may see, on their way, and its parts of others'.

    Of every level that is about as many rows of cells above and below the band as the halo has rows
    of tokens. A rank gets one message from every other that has some.

    Args:
        keys: by levels (0, of tokens, may be among them) the key that their cells are made of.
        value: as the keys, (batch, own rows * width, heads, head_dim), of this rank's band.
        weight: (far_levels or more, 2, 2), of cells' children; see `pool_cells`.
        scale: factor on query times key.
        window: of the whole image.
        cells: level by level, from 1.
    """

    def __init__(
        self,
        keys: Iterable[tuple[range, torch.Tensor]],
        value: torch.Tensor,
        weight: torch.Tensor | None,
        scale: float,
        window: Window,
        bands: Bands,
        cells: list[CellBands],
        group: dist.ProcessGroup,
        traffic: Traffic,
    ) -> None:
        self._rank, self._dtype, self._traffic = bands.rank, value.dtype, traffic
        made = []
        for own, key in keys:
            first = max(own.start, 1)
            if own.stop > first:
                pyramid = pool_cell_rows(
                    key, value, weight, window.width, own.stop - 1, scale, bands.own
                )
                made += pyramid[first - 1 :]
        masses = [torch.stack(part[2:]) for part in made]
        weights = _weights_of_parts(masses, cells, bands.rank, group, traffic)
        parts = [
            torch.cat(part[:2]) * weight if level.are_cut else torch.cat(part[:2]).to(value.dtype)
            for part, weight, level in zip(made, weights, cells, strict=True)
        ]
        levels = [_Level(level, part, bands.rank) for level, part in zip(cells, parts, strict=True)]
        self._levels = levels
        # The coarsest first: in a message the wider numbers then lie on multiples of their size.
        self._in_messages = [level for level in levels[::-1] if not level.cells.are_reduced]
        self._reduced = [level.sums for level in levels if level.cells.are_reduced]
        self._works = [*self._start_messages(bands, group), *self._start_reduction(group)]

    def _start_messages(self, bands: Bands, group: dist.ProcessGroup) -> list[dist.Work]:
        levels = self._in_messages
        others = [rank for rank in range(bands.ranks) if rank != bands.rank] if levels else []
        self._outgoing = [
            (rank, torch.cat([level.part_for(rank).view(torch.uint8) for level in levels]))
            for rank in others
        ]
        self._incoming = [
            (rank, message.new_empty(sum(self._bytes_from(rank))))
            for rank, message in self._outgoing
        ]
        self._traffic.sent["far"] += sum(message.nbytes for _, message in self._outgoing)
        operations = [
            dist.P2POp(operation, message, group=group, group_peer=rank)
            for operation, messages in ((dist.isend, self._outgoing), (dist.irecv, self._incoming))
            for rank, message in messages
            if len(message)
        ]
        return dist.batch_isend_irecv(operations) if operations else []

    def _start_reduction(self, group: dist.ProcessGroup) -> list[dist.Work]:
        if not self._reduced:
            return []
        self._together = torch.cat([sums.flatten() for sums in self._reduced])
        ranks = group.size()
        self._traffic.sent["far"] += 2 * (ranks - 1) * self._together.nbytes // ranks
        return [dist.all_reduce(self._together, group=group, async_op=True)]

    def _bytes_from(self, rank: int) -> list[int]:
        """Of each level in a message of a rank."""
        return [level.bytes_from(rank) for level in self._in_messages]

    def wait(self) -> KeyValue:
        """Key and value of the cells, (batch, cells, heads, head_dim): level after level, from 1.

        Of every level the rows that this rank gets, in raster order.
        """
        with self._traffic.wait():
            for work in self._works:
                work.wait()
        for rank, message in self._incoming:
            parts = message.split(self._bytes_from(rank))
            for level, part in zip(self._in_messages, parts, strict=True):
                level.add(rank, part)
        if self._reduced:
            whole = self._together.split([sums.numel() for sums in self._reduced])
            for sums, values in zip(self._reduced, whole, strict=True):
                sums.copy_(values.view_as(sums))
        cells = [level.sums.flatten(1, 2).to(self._dtype) for level in self._levels]
        key, value = torch.cat(cells, dim=1).chunk(2)
        return key, value


def _weights_of_parts(
    masses: list[torch.Tensor],
    cells: list[CellBands],
    rank: int,
    group: dist.ProcessGroup,
    traffic: Traffic,
) -> list[torch.Tensor]:
    """The shares of this rank's parts in the whole cells.

    Cells with parts of several ranks are in the first or last row of each, so that only these rows
    are exchanged.

    Args:
        masses: level by level (2, batch, rows of cells, columns, heads), of the rows made: largest
            and mass, see `shares`.

    Returns:
        Level by level (2 batch, rows of cells, columns, heads, 1), for key and value.
    """
    edges = torch.cat([mass[:, :, [0, -1]] for mass in masses], dim=3)
    gathered = torch.stack(Gathered(edges, group, traffic, "far").wait(), dim=1)
    of_levels = gathered.split([mass.shape[3] for mass in masses], dim=4)
    weights = []
    for mass, level, parts in zip(masses, cells, of_levels, strict=True):
        weight, own = torch.ones_like(mass[0]), level.made[rank]
        for row in (own.start, own.stop - 1):
            ranks = [other for other, made in enumerate(level.made) if row in made]
            at = [0 if row == level.made[other].start else 1 for other in ranks]
            share, _, _ = shares(*parts[:, ranks, :, at].unbind(1))
            weight[:, row - own.start] = share[ranks.index(rank)]
        weights.append(torch.cat([weight, weight]).unsqueeze(-1))
    return weights


class _Level:
    """The cells of a level on one rank: its parts, and the sums of all that it got.

    Args:
        part: (2 batch, rows of cells, columns, heads, head_dim), key and value, of the rows made.
    """

    def __init__(self, cells: CellBands, part: torch.Tensor, rank: int) -> None:
        self.cells, self._part, self._rank = cells, part, rank
        self.sums = part.new_zeros(len(part), len(cells.seen[rank]), *part.shape[2:])
        self.add(rank, self.part_for(rank))

    def part_for(self, rank: int) -> torch.Tensor:
        """What this rank contributes to the cells that another sees, as one row of numbers."""
        wanted, first = self.cells.sent(self._rank, rank), self.cells.made[self._rank].start
        return self._part[:, wanted.start - first : wanted.stop - first].flatten()

    def bytes_from(self, rank: int) -> int:
        """Bytes of what another rank contributes to the cells that this one sees."""
        return len(self.cells.sent(rank, self._rank)) * self._part[:, :1].nbytes

    def add(self, rank: int, part: torch.Tensor) -> None:
        """Add what a rank contributes; part: one row, of numbers or of their bytes."""
        rows, first = self.cells.sent(rank, self._rank), self.cells.seen[self._rank].start
        sums = self.sums[:, rows.start - first : rows.stop - first]
        sums += part.view(sums.dtype).view(sums.shape)


def _rows_of_cells(tokens: range, side: int) -> range:
    """The rows of cells of so many tokens that have some of these rows of tokens."""
    return range(tokens.start // side, math.ceil(tokens.stop / side))


def _are_cut(rows: list[range]) -> bool:
    return any(above.stop > below.start for above, below in pairwise(rows))
