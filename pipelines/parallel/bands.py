"""Whose rows are whose: an image cut into bands of rows of tokens, one for each rank.

A band's queries see rows of other bands too, at most `reach` above and below: the halo. Queries
that do not see it, the interior, need not wait for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

# The interior is made of whole stretches of so many rows: query tiles of the implementations.
QUERY_ROWS = 8


@dataclass(frozen=True)
class Piece:
    """Rows of queries that are computed together, and the rows of keys they are given."""

    queries: range
    keys: range


@dataclass(frozen=True)
class Bands:
    """An image of `rows` rows of tokens, shared by `ranks` ranks, as seen by one of them.

    Attributes:
        rows: of the image, in tokens.
        ranks: number of bands; they differ by one row at most.
        rank: whose view this is, from 0; bands lie from top to bottom.
        reach: rows above and below a query that it sees, at least 0.

    Raises:
        ValueError: there are more ranks than rows.
    """

    rows: int
    ranks: int
    rank: int
    reach: int

    def __post_init__(self) -> None:
        if self.ranks > self.rows:
            raise ValueError(
                f"patch parallel: an image of {self.rows} rows of tokens can be shared by at most "
                f"{self.rows} ranks, got {self.ranks}; use fewer ranks or a larger image."
            )

    def of(self, rank: int) -> range:
        """The rows of a rank."""
        return range(self.rows * rank // self.ranks, self.rows * (rank + 1) // self.ranks)

    @cached_property
    def own(self) -> range:
        """The rows of this rank."""
        return self.of(self.rank)

    @property
    def largest(self) -> int:
        """Rows of the largest band."""
        return -(-self.rows // self.ranks)

    def halo(self, rank: int) -> tuple[range, range]:
        """Rows above and below a rank's own that its queries see."""
        own = self.of(rank)
        above = range(max(0, own.start - self.reach), own.start)
        return above, range(own.stop, min(self.rows, own.stop + self.reach))

    @cached_property
    def receives(self) -> list[tuple[int, range]]:
        """(rank, its rows) that make up this rank's halo, from top to bottom."""
        return [
            (rank, rows)
            for side in self.halo(self.rank)
            for rank in range(self.ranks)
            if (rows := common(side, self.of(rank)))
        ]

    @cached_property
    def sends(self) -> list[tuple[int, range]]:
        """(rank, own rows) that are part of others' halos."""
        return [
            (rank, rows)
            for rank in range(self.ranks)
            if rank != self.rank
            for side in self.halo(rank)
            if (rows := common(side, self.own))
        ]

    @cached_property
    def interior(self) -> Piece | None:
        """The queries that see no halo, if any."""
        above, below = self.halo(self.rank)
        start, stop = self.own.start, self.own.stop
        if above:
            start += -(-self.reach // QUERY_ROWS) * QUERY_ROWS
        if below:
            stop = start + (stop - self.reach - start) // QUERY_ROWS * QUERY_ROWS
        return Piece(range(start, stop), self.own) if start < stop else None

    @cached_property
    def borders(self) -> list[Piece]:
        """The other queries, with the rows they see."""
        inside = self.interior
        if inside is None:
            parts = [self.own]
        else:
            parts = [
                range(self.own.start, inside.queries.start),
                range(inside.queries.stop, self.own.stop),
            ]
        return [Piece(part, self._seen(part)) for part in parts if part]

    def _seen(self, rows: range) -> range:
        return range(max(0, rows.start - self.reach), min(self.rows, rows.stop + self.reach))


def common(one: range, other: range) -> range:
    """The rows that are in both, possibly none."""
    start = max(one.start, other.start)
    return range(start, max(start, min(one.stop, other.stop)))
