"""How a sequence of tokens is made up, and the order local attention takes it in.

Local attention wants first what everyone sees, then the image. A family whose layers put the
image first, or other images behind it, says so here; nothing else depends on the order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..kernels.window import EVERYTHING, Window


class Layout(NamedTuple):
    """How a sequence is made up, in tokens: text, the image in raster order, reference images.

    Attributes:
        text_length: tokens of the prompt.
        rows, columns: of the image.
        reference_length: tokens of other images (and of padding behind the image), which stand
            right behind the image. They are treated as text is.
        image_first: whether a layer with one sequence has image and references before the text.
            Layers that get image and text apart are the same either way.
        local_references: (rows, columns) of every reference image, where they are local within
            themselves; else empty.
    """

    text_length: int
    rows: int
    columns: int
    reference_length: int = 0
    image_first: bool = False
    local_references: tuple[tuple[int, int], ...] = ()

    @property
    def image_length(self) -> int:
        """Number of the image's tokens."""
        return self.rows * self.columns

    @property
    def sequence_length(self) -> int:
        """Number of all tokens."""
        return self.text_length + self.image_length + self.reference_length

    @property
    def and_references(self) -> str:
        """For messages: " and 12 of reference images", or nothing."""
        number = self.reference_length
        return f" and {number} of reference images" if number else ""

    @property
    def image_only(self) -> Layout:
        """The layout of the image's tokens alone, as layers with two streams have them."""
        return self._replace(text_length=0)

    def window(
        self, radius: int, down_factor: int, far_levels: int = 0, pooled_weight: str = "one"
    ) -> Window:
        """Who attends to whom once the reference images are moved behind the text.

        They are treated as text is: seen by every query, and seeing everything, but maybe (see
        `local_references`) of themselves only the disc. An edit may move things further than the
        disc reaches; and they do not grow with the image. Only the image has far keys.

        With a radius of `EVERYTHING` all tokens see all, and neither pooled keys nor anything else
        means anything.
        """
        text = self.text_length + self.reference_length
        if radius >= EVERYTHING:
            return Window(self.rows, self.columns, text, EVERYTHING)
        return Window(
            self.rows, self.columns, text, radius, down_factor,
            local_references=self.local_references,
            far_levels=far_levels,
            pooled_weight=pooled_weight,
        )  # fmt: skip

    def to_local(self, tokens: torch.Tensor) -> torch.Tensor:
        """(batch, sequence, ...) in a layer's order as local attention takes it.

        That is text, references, image. The tensor itself where that is the layer's order.
        """
        length, end = self.image_length, self.image_length + self.reference_length
        if self.image_first and self.text_length:
            parts = tokens[:, end:], tokens[:, length:end], tokens[:, :length]
        elif self.reference_length:
            start = self.text_length
            text, image = tokens[:, :start], tokens[:, start:]
            parts = text, image[:, length:], image[:, :length]
        else:
            return tokens
        return torch.cat(parts, dim=1)

    def to_layer(self, tokens: torch.Tensor) -> torch.Tensor:
        """The inverse of `to_local`."""
        start = self.text_length + self.reference_length
        text, references = tokens[:, : self.text_length], tokens[:, self.text_length : start]
        if self.image_first and self.text_length:
            parts = tokens[:, start:], references, text
        elif self.reference_length:
            parts = text, tokens[:, start:], references
        else:
            return tokens
        return torch.cat(parts, dim=1)
