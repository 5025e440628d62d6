"""Bytes a rank sends in one attention layer, by the way in which ranks share an image.

One forward pass at batch 1, of the rank that sends most. Of a collective, what a rank must send at
least: in an all-to-all everything but its own part, in an all-reduce 2 (ranks - 1) / ranks of the
tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..kernels.cells import cell_count, levels_needed
from ..kernels.window import Window

if TYPE_CHECKING:
    from ..pipelines.parallel.bands import Bands

FLOAT32 = 4


@dataclass(frozen=True)
class Layer:
    """An attention layer of an image.

    Attributes:
        rows, columns: of the image, in tokens.
        text_length: text tokens.
        radius: of CLEAR's window, in tokens.
        far: whether it has far keys.
        heads, head_dim: the layer's input has heads * head_dim channels.
        itemsize: bytes of a number.
    """

    rows: int
    columns: int
    text_length: int
    radius: int
    heads: int
    head_dim: int
    itemsize: int
    far: bool = False

    @property
    def tokens(self) -> int:
        """Of text and image."""
        return self.text_length + self.rows * self.columns

    @property
    def token_bytes(self) -> int:
        """Of a token, as query, key, value or the layer's input."""
        return self.heads * self.head_dim * self.itemsize


def halo_bytes(layer: Layer, ranks: int) -> int:
    """Patch parallelism: rows of the layer's input that other bands see, rows of cells, the text.

    No rank sends more rows than twice the reach of a query, however many there are. The outputs of
    text queries are merged by an all-reduce of their log-sum-exp and one of the weighted sums, in
    float32.
    """
    from ..pipelines.parallel.bands import Bands

    size = (layer.rows, layer.columns)
    levels = levels_needed(*size, layer.radius) if layer.far else 0
    window = Window(*size, 0, layer.radius, far_levels=levels)
    views = [Bands(layer.rows, ranks, rank, window.reach) for rank in range(ranks)]
    of_cells = far_bytes(layer, window, views[0])
    most = max(
        sum(len(part) for _, part in view.sends) * layer.columns * layer.token_bytes + of_rank
        for view, of_rank in zip(views, of_cells, strict=True)
    )
    merged = layer.text_length * layer.heads * (1 + layer.head_dim + 1) * FLOAT32
    return most + 2 * (ranks - 1) * merged // ranks


def far_bytes(layer: Layer, window: Window, bands: Bands) -> list[int]:
    """What each rank sends of far keys: of every level the rows of cells that others' queries see.

    Key and value; in float32 where a row of cells has tokens of several ranks, which add it up.
    Coarse levels are all-reduced.
    """
    from ..pipelines.parallel.pooled import CellBands

    ranks = range(bands.ranks)
    sent = [0 for _ in ranks]
    for level in range(1, window.far_levels + 1):
        cells = CellBands.of(window, bands, level)
        itemsize = max(layer.itemsize, FLOAT32) if cells.are_cut else layer.itemsize
        row = 2 * cell_count(layer.columns, level) * layer.heads * layer.head_dim * itemsize
        for rank in ranks:
            if cells.are_reduced:
                whole = cell_count(layer.rows, level) * row
                sent[rank] += 2 * (bands.ranks - 1) * whole // bands.ranks
            else:
                sent[rank] += cells.rows_sent(rank) * row
    return sent


def ulysses_bytes(layer: Layer, ranks: int) -> int | None:
    """DeepSpeed-Ulysses: all-to-alls of query, key, value and output, between tokens and heads.

    Section 3.2 of arXiv 2309.14509: 4 N h / P for N tokens of h channels on P ranks; without the
    part that stays, (P - 1) / P of it. None where the heads do not divide among the ranks.
    """
    if layer.heads % ranks:
        return None
    return 4 * layer.tokens * layer.token_bytes * (ranks - 1) // ranks**2


def ring_bytes(layer: Layer, ranks: int) -> int:
    """Ring attention: every rank's keys and values go round, past all the others.

    Section 3 of arXiv 2310.01889: a block of keys and one of values are passed on ranks - 1 times.
    """
    return 2 * layer.tokens * layer.token_bytes * (ranks - 1) // ranks
