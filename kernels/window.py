"""The geometry of CLEAR attention (arXiv 2412.16112, section 3.2) as one value.

A token is one packed latent patch: 16 x 16 pixels for FLUX. The sequence is text tokens first, then
the image tokens in raster order. Keys may be followed by pooled tokens (see `pooling.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch

Derived = TypeVar("Derived")


@dataclass(frozen=True)
class Window:
    """Who attends to whom, in tokens.

    - An image query at (y, x) sees the image keys at (y', x') with
      (y - y')^2 + (x - x')^2 < radius^2 (strict; nothing beyond the border), all text keys and,
      with `down_factor` > 1, all pooled keys.
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

    Raises:
        TypeError: a size is not an int, or local_references no tuple of pairs.
        ValueError: a field is out of its range, a pooling cell is larger than the grid, or the
            reference images are not among the text or come with `query_rows`.
    """

    height: int
    width: int
    text_length: int
    radius: int
    down_factor: int = 1
    query_rows: tuple[int, int] | None = None
    local_references: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        minimum = {"height": 1, "width": 1, "text_length": 0, "radius": 1, "down_factor": 1}
        for name, least in minimum.items():
            _check_size(name, getattr(self, name), least)
        if self.down_factor > 1 and self.down_factor > min(self.height, self.width):
            raise ValueError(
                f"Window: down_factor must not exceed the token grid ({self.height} x "
                f"{self.width}), got {self.down_factor}; use a larger image or down_factor=1."
            )
        if self.query_rows is not None:
            start, stop = self.query_rows
            if not 0 <= start < stop <= self.height:
                raise ValueError(
                    f"Window: query_rows must be (start, stop) with 0 <= start < stop <= "
                    f"{self.height}, got {self.query_rows}."
                )
        if self.local_references != ():
            self._check_references()

    def _check_references(self) -> None:
        images = self.local_references
        if not isinstance(images, tuple) or not all(
            isinstance(size, tuple) and len(size) == 2 for size in images
        ):
            raise TypeError(
                f"Window: local_references must be a tuple of (rows, columns), got {images!r}."
            )
        for rows, columns in images:
            _check_size("rows of local_references", rows, 1)
            _check_size("columns of local_references", columns, 1)
        if self.references_start < 0:
            raise ValueError(
                f"Window: local_references {images} must be among the "
                f"{self.text_length} tokens of text_length."
            )
        if self.query_rows is not None:
            raise ValueError("Window: local_references and query_rows exclude each other.")

    def __getstate__(self) -> dict[str, Any]:
        # What was remembered on the value (FlexAttention's mask, derived windows) stays behind.
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def disc_radius(self) -> int:
        """The radius, no larger than is needed to cover the grid: its square stays small."""
        return min(self.radius, self.height + self.width)

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
    def pooled_length(self) -> int:
        """Number of pooled keys; a last partial cell in either direction counts as a cell."""
        if self.down_factor == 1:
            return 0
        return math.ceil(self.height / self.down_factor) * math.ceil(self.width / self.down_factor)

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
            bool, (queries, text + image + pooled). Quadratic: for tests and oracles.
        """
        if self.query_rows is not None:
            start, stop = (self.text_length + row * self.width for row in self.query_rows)
            return replace(self, query_rows=None).mask(device)[start:stop]
        text, pooled = self.text_length, self.pooled_length
        y = torch.arange(self.height, device=device).repeat_interleave(self.width)
        x = torch.arange(self.width, device=device).repeat(self.height)
        distance2 = (y[:, None] - y[None, :]) ** 2 + (x[:, None] - x[None, :]) ** 2
        mask = torch.ones(
            self.sequence_length, self.sequence_length + pooled, dtype=torch.bool, device=device
        )
        mask[text:, text : self.sequence_length] = distance2 < self.disc_radius**2
        mask[:text, self.sequence_length :] = False
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

    def attended_pairs(self) -> int:
        """Number of (query, key) pairs: the sum of `mask()`, in closed form."""
        text = self.text_query_length
        image = self.query_length - text
        dense = text * self.sequence_length + image * (self.text_length + self.pooled_length)
        unseen = sum(own.image_length**2 - own.disc_pairs() for own in self.reference_windows)
        return dense - unseen + self.disc_pairs()

    def attention_flops(self, heads: int, head_dim: int) -> int:
        """Floating-point operations of one attention layer, batch 1.

        4 * attended pairs * heads * head_dim: two for each product of query and key, two for each
        product of probability and value (as the paper's table 2 counts; softmax not counted).
        """
        return 4 * self.attended_pairs() * heads * head_dim


def _check_size(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"Window: {name} must be an int, got {value!r}.")
    if value < least:
        raise ValueError(f"Window: {name} must be at least {least} token(s), got {value}.")
