"""The geometry of CLEAR attention (arXiv 2412.16112, section 3.2) as one value.

A token is one packed latent patch: 16 x 16 pixels for FLUX. The sequence is text tokens first, then
the image tokens in raster order. Keys may be followed by pooled tokens (see `pooling.py`): those of
the paper's `down_factor`, or far keys, which let a query see the whole image (see `cells.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, TypeVar

import torch

from .cells import (
    MOST_LEVELS,
    Comparisons,
    cell_count,
    comparisons,
    looked_into,
    rows_in_reach,
)
from .numbers import as_integer

# How much a pooled key of `down_factor` weighs: as one key, or as the tokens it stands for.
POOLED_WEIGHTS = ("one", "count")
# Rows and columns together with far keys: squared distances fit into 32 bits.
LARGEST_FAR_GRID = 2**14
# Where tokens have two positions, levels of far keys that end within this share of the longer side,
# at most, are scored by the true ones.
NEAR_SHARE = 1 / 4
# A radius that reaches past the diagonal of every grid.
EVERYTHING = 2**20

Derived = TypeVar("Derived")


@dataclass(frozen=True)
class Window:
    """Who attends to whom, in tokens.

    - An image query at (y, x) sees the image keys at (y', x') with
      (y - y')^2 + (x - x')^2 < radius^2 (strict; nothing beyond the border), all text keys and,
      with `down_factor` > 1, all pooled keys.
    - With `far_levels` an image query sees all tokens: near ones one by one, far ones pooled into
      cells that grow with their distance, each token exactly once (see `cells.py`). A cell is the
      mean of its tokens, weighted by the softmax of scale times the squared length of their keys:
      long keys dominate what they would add to a softmax. It counts as its tokens: the log of
      their number is added to its score.
    - A text query sees all text keys and all image keys, but no pooled key.
    - With `local_references`, a token of such a reference image sees of its own image the tokens of
      its disc only; everything else as a text query does.

    Attributes:
        height: rows of the image's token grid, at least 1.
        width: columns of the image's token grid, at least 1.
        text_length: number of text tokens, at least 0.
        radius: radius of the disc, in tokens, at least 1 (1 is the token itself).
        down_factor: side of a pooling cell, in tokens; 1 means no pooled keys.
        query_rows: None where every token is a query. (start, stop) where only the image tokens of
            these rows are, and no text: the share of a process that has no more of the image.
        local_references: (rows, columns) of reference images that are local within themselves. They
            are the last of the `text_length` tokens, in this order, each in raster order.
        far_levels: levels of far keys, 0 to MOST_LEVELS; 0 is CLEAR's disc alone. More levels than
            the grid needs are as good as enough: nobody sees their cells.
        pooled_weight: of a pooled key of `down_factor`: "one", as published, or "count": the log of
            the tokens it stands for is added to its score. Their overlap with the disc stays.
        key_rows: None where all keys are given. Else (start, stop) of the image's rows of tokens
            that are, and of the rows of cells of every level: what is not given is not attended to
            (it is to be merged, see merge.py). With far keys and `query_rows` only.

    Raises:
        TypeError: a size is not an int, or local_references no tuple of pairs.
        ValueError: a field is out of its range, a pooling cell is larger than the grid, the
            reference images are not among the text or come with `query_rows`, or far keys come with
            `down_factor`, with radius 1 or with a grid too large.
    """

    height: int
    width: int
    text_length: int
    radius: int
    down_factor: int = 1
    query_rows: tuple[int, int] | None = None
    local_references: tuple[tuple[int, int], ...] = ()
    far_levels: int = 0
    pooled_weight: str = "one"
    key_rows: tuple[tuple[int, int], ...] | None = None

    def __post_init__(self) -> None:
        minimum = {"height": 1, "width": 1, "text_length": 0, "radius": 1, "down_factor": 1}
        for name, least in minimum.items():
            self._check_size(name, least)
        if self.down_factor > 1 and self.down_factor > min(self.height, self.width):
            raise ValueError(
                f"Window: down_factor must not exceed the token grid ({self.height} x "
                f"{self.width}), got {self.down_factor}; use a larger image or down_factor=1."
            )
        if self.query_rows is not None:
            start, stop = (_size("query_rows", row, 0) for row in self.query_rows)
            if not all(isinstance(row, int) for row in self.query_rows):
                object.__setattr__(self, "query_rows", (start, stop))
            if not start < stop <= self.height:
                raise ValueError(
                    f"Window: query_rows must be (start, stop) with 0 <= start < stop <= "
                    f"{self.height}, got {self.query_rows}."
                )
        if self.local_references != ():
            self._check_references()
        self._check_pooling()

    def _check_size(self, name: str, least: int) -> None:
        """Leave an int in a field, or refuse it."""
        given = getattr(self, name)
        size = _size(name, given, least)
        if not isinstance(given, int):
            object.__setattr__(self, name, size)

    def _check_references(self) -> None:
        images = self.local_references
        if not isinstance(images, tuple) or not all(
            isinstance(size, tuple) and len(size) == 2 for size in images
        ):
            raise TypeError(
                f"Window: local_references must be a tuple of (rows, columns), got {images!r}."
            )
        images = tuple(
            (
                _size("rows of local_references", rows, 1),
                _size("columns of local_references", columns, 1),
            )
            for rows, columns in images
        )
        object.__setattr__(self, "local_references", images)
        if self.references_start < 0:
            raise ValueError(
                f"Window: local_references {images} must be among the "
                f"{self.text_length} tokens of text_length."
            )
        if self.query_rows is not None:
            raise ValueError("Window: local_references and query_rows exclude each other.")

    def _check_pooling(self) -> None:
        self._check_size("far_levels", 0)
        if self.pooled_weight not in POOLED_WEIGHTS:
            raise ValueError(
                f"Window: pooled_weight must be {' or '.join(POOLED_WEIGHTS)}, got "
                f"{self.pooled_weight!r}."
            )
        if self.pooled_weight == "count" and self.down_factor == 1:
            raise ValueError('Window: pooled_weight="count" needs a down_factor above 1.')
        if self.far_levels:
            if self.far_levels > MOST_LEVELS:
                raise ValueError(
                    f"Window: far_levels must be at most {MOST_LEVELS}, got {self.far_levels}; "
                    "more than the grid needs are as good as enough."
                )
            if self.down_factor > 1:
                raise ValueError(
                    "Window: far keys (far_levels) and pooled keys (down_factor) exclude each "
                    f"other, got {self.far_levels} and {self.down_factor}."
                )
            if self.radius < 2:
                raise ValueError(
                    f"Window: far keys need a radius of at least 2 tokens, got {self.radius}."
                )
            if self.height + self.width > LARGEST_FAR_GRID:
                raise ValueError(
                    f"Window: far keys take at most {LARGEST_FAR_GRID} rows and columns together, "
                    f"got {self.height} + {self.width}."
                )
        if self.key_rows is not None:
            whole = tuple((0, cell_count(self.height, one)) for one in range(self.far_levels + 1))
            inside = len(self.key_rows) == len(whole) and all(
                0 <= start <= stop <= end
                for (start, stop), (_, end) in zip(self.key_rows, whole, strict=True)
            )
            if not inside or self.query_rows is None or not self.far_levels:
                raise ValueError(
                    "Window: key_rows must be (start, stop) of the rows of tokens and of every "
                    f"level's cells, within {whole}, and come with query_rows and far_levels; got "
                    f"{self.key_rows}."
                )

    def __getstate__(self) -> dict[str, Any]:
        # What was remembered on the value (FlexAttention's mask, derived windows) stays behind.
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def given_rows(self, level: int) -> tuple[int, int]:
        """Rows of a level's cells (of tokens, for level 0) that are among the keys."""
        if self.key_rows is None:
            return 0, cell_count(self.height, level)
        return self.key_rows[level]

    def rows_in_reach(self, level: int, rows: range) -> range:
        """Rows of a level's cells (of tokens, for level 0) that queries of some rows may see."""
        return rows_in_reach(self.height, self.disc_radius, self.far_levels, level, rows)

    def comparisons(self, level: int, device: torch.device | str | None = None) -> Comparisons:
        """What decides which image query sees which of the given keys of a level."""
        return comparisons(
            self.height, self.width, self.disc_radius, self.far_levels, level,
            self.given_rows(level), device,
        )  # fmt: skip

    @property
    def disc_radius(self) -> int:
        """The radius, no larger than is needed to cover the grid: its square stays small."""
        return min(self.radius, self.height + self.width)

    @property
    def sees_everything(self) -> bool:
        """Whether every query sees every token, whatever the grid, and no pooled key besides.

        By the radius alone, `EVERYTHING`, so that torch.compile need not know the grid.
        """
        return (
            self.radius >= EVERYTHING
            and self.down_factor == 1
            and self.far_levels == 0
            and self.local_references == ()
        )

    def with_radius(self, radius: int) -> Window:
        """The same tokens with another radius; with `EVERYTHING` nothing else is left to say."""
        if radius < EVERYTHING:
            return replace(self, radius=radius)
        return Window(
            self.height, self.width, self.text_length, EVERYTHING, query_rows=self.query_rows
        )

    @property
    def reach(self) -> int:
        """Rows above and below an image query in which there may be tokens that it sees."""
        return self.disc_radius if self.far_levels else self.disc_radius - 1

    @property
    def image_length(self) -> int:
        """Number of image tokens."""
        return self.height * self.width

    @property
    def sequence_length(self) -> int:
        """Number of text and image tokens."""
        return self.text_length + self.image_length

    @property
    def image_query_rows(self) -> tuple[int, int]:
        """First row of image queries, and the row after the last."""
        return (0, self.height) if self.query_rows is None else self.query_rows

    @property
    def text_query_length(self) -> int:
        """Number of text tokens that are queries: all, or none with `query_rows`."""
        return self.text_length if self.query_rows is None else 0

    @property
    def query_length(self) -> int:
        """Number of queries, text and image."""
        start, stop = self.image_query_rows
        return self.text_query_length + (stop - start) * self.width

    @property
    def key_length(self) -> int:
        """Number of the text's and the image's keys that are given."""
        start, stop = self.given_rows(0)
        return self.text_length + (stop - start) * self.width

    @property
    def pooled_length(self) -> int:
        """Number of pooled keys; a last partial cell in either direction counts as a cell.

        Far keys are those of level 1 in raster order, then those of level 2, and so on.
        """
        if self.far_levels:
            return sum(self.cells_of_level(level) for level in range(1, self.far_levels + 1))
        if self.down_factor == 1:
            return 0
        return math.ceil(self.height / self.down_factor) * math.ceil(self.width / self.down_factor)

    def cells_of_level(self, level: int) -> int:
        """Number of a level's cells that are among the keys."""
        start, stop = self.given_rows(level)
        return (stop - start) * cell_count(self.width, level)

    @property
    def references_start(self) -> int:
        """Place of the first token of `local_references` in the sequence; behind the text."""
        return self.text_length - sum(rows * columns for rows, columns in self.local_references)

    @property
    def image_only(self) -> Window:
        """The image's disc, without text and pooled keys; always the same object."""
        return self._once("_image_only", lambda: Window(self.height, self.width, 0, self.radius))

    @property
    def image_queries(self) -> Window:
        """The same keys, seen by the image's tokens alone; always the same object."""
        return self._once(
            "_image_queries",
            lambda: replace(self, query_rows=self.image_query_rows, local_references=()),
        )

    def levels_by_position(self, between: int = 0) -> list[range]:
        """The levels of far keys that are scored by each position of a token; level 0 is tokens.

        By the true position: tokens, and levels that end within `NEAR_SHARE` of the longer side
        and, about, within the trained extent. By each one between: those that end within twice as
        far as the ones before. By the last: all others. A level's cells are seen from a radius
        times 2^(level - 1) tokens on, up to twice as far away; those of the last level to the end
        of the image.

        Args:
            between: positions between the true one and the last, each scaled some twice as much as
                the one before; the last lie within the extent the model was trained at.
        """
        near = max(self.height, self.width) * min(NEAR_SHARE, 0.5 ** (between + 1))
        starts = [0]
        for step in range(between + 1):
            ends = (self.radius * 2**level for level in range(1, self.far_levels))
            starts.append(1 + sum(end <= near * 2**step for end in ends))
        return [range(*ends) for ends in pairwise([*starts, self.far_levels + 1])]

    def parts_by_position(self, between: int = 0) -> tuple[Window, ...]:
        """With far keys: the image's queries, and of the keys those of `levels_by_position`, where
        there are any; the text's are in the last. Always the same objects; together they are
        `image_queries`.
        """
        return self._once(f"_parts_{between}", lambda: tuple(self._parts(between)))

    def _parts(self, between: int) -> Iterator[Window]:
        parts = [levels for levels in self.levels_by_position(between) if levels]
        for levels in parts:
            rows = tuple(
                self.given_rows(level) if level in levels else (0, 0)
                for level in range(self.far_levels + 1)
            )
            yield replace(
                self.image_queries,
                text_length=self.text_length if levels is parts[-1] else 0,
                query_rows=self.image_query_rows,
                key_rows=rows,
            )

    @property
    def reference_windows(self) -> tuple[Window, ...]:
        """The disc within each of `local_references`; always the same objects."""
        sizes, radius = self.local_references, self.radius
        return self._once(
            "_reference_windows", lambda: tuple(Window(*size, 0, radius) for size in sizes)
        )

    def _once(self, name: str, make: Callable[[], Derived]) -> Derived:
        """What is derived from the value, remembered for what implementations remember on it."""
        if torch.compiler.is_compiling():  # the value itself may live in the trace alone
            return make()
        if name not in self.__dict__:
            self.__dict__[name] = make()
        return self.__dict__[name]

    def mask(self, device: torch.device | str | None = None) -> torch.Tensor:
        """Dense mask, True where a query attends to a key.

        Returns:
            bool, (queries, text + image + pooled), of the keys that are given. Quadratic: for tests
            and oracles.
        """
        text, text_queries = self.text_length, self.text_query_length
        start, stop = self.image_query_rows
        y = torch.arange(start, stop, device=device).repeat_interleave(self.width)[:, None]
        x = torch.arange(self.width, device=device).repeat(stop - start)[:, None]
        image = [self.comparisons(level, device).seen(y, x) for level in range(self.far_levels + 1)]
        mask = torch.ones(
            self.query_length, self.key_length + self.pooled_length, dtype=torch.bool, device=device
        )
        mask[:text_queries, self.key_length :] = False
        seen = torch.cat(image, dim=1)
        mask[text_queries:, text : text + seen.shape[1]] = seen
        start = self.references_start
        for own in self.reference_windows:
            stop = start + own.image_length
            mask[start:stop, start:stop] = own.mask(device)
            start = stop
        return mask

    def disc_pairs(self) -> int:
        """Number of (image query, image key) pairs inside the disc."""
        radius = self.disc_radius
        reach = radius - 1
        start, stop = self.image_query_rows
        pairs = 0
        for dy in range(-min(reach, self.height - 1), min(reach, self.height - 1) + 1):
            # Largest dx with dx^2 + dy^2 < radius^2, within the grid.
            half = min(math.isqrt(radius**2 - dy**2 - 1), self.width - 1)
            columns = (2 * half + 1) * self.width - half * (half + 1)
            # Rows of queries that have a row dy further down.
            pairs += columns * max(0, min(stop, self.height - dy) - max(start, -dy))
        return pairs

    def far_pairs(self) -> tuple[int, ...]:
        """Number of (image query, key) pairs with far keys: tokens, then cells level by level.

        By rows: pairs of rows and pairs of columns are counted by their distance, which takes time
        and memory of the squares of the grid's sides.
        """
        rows = range(*self.image_query_rows)
        sizes = self.height, self.width, self.disc_radius
        queries, pairs = len(rows) * self.width, []
        for level in range(self.far_levels + 1):
            given, columns = self.given_rows(level), cell_count(self.width, level)
            if level < self.far_levels:
                around = looked_into(*sizes, level + 1, rows, given, children=True)
            else:
                around = queries * (given[1] - given[0]) * columns
            if level:
                around -= looked_into(*sizes, level, rows, given, children=False)
            pairs.append(around)
        return tuple(pairs)

    def attended_pairs(self) -> int:
        """Number of (query, key) pairs: the sum of `mask()`, without one."""
        text = self.text_query_length
        image = self.query_length - text
        if self.far_levels:
            seen = sum(self.far_pairs())
        else:
            seen = self.disc_pairs() + image * self.pooled_length
        dense = text * self.key_length + image * self.text_length
        unseen = sum(own.image_length**2 - own.disc_pairs() for own in self.reference_windows)
        return dense - unseen + seen

    def attention_flops(self, heads: int, head_dim: int) -> int:
        """Floating-point operations of one attention layer, batch 1.

        4 * attended pairs * heads of the query * head_dim: two for each product of query and key,
        two for each product of probability and value (as the paper's table 2 counts; softmax not
        counted).
        """
        return 4 * self.attended_pairs() * heads * head_dim


def _size(name: str, value: object, least: int) -> int:
    size = as_integer(value)
    if size is None:
        raise TypeError(f"Window: {name} must be an int, got {value!r}.")
    if size < least:
        raise ValueError(f"Window: {name} must be at least {least} token(s), got {size}.")
    return size
