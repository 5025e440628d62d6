"""Qwen-Image's positions beyond those it was trained with, and beyond its stored table.

The image's centre is at 0. Text follows on the longer half side of the image, on the diagonal: a
token has the same position on all axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..attention.axes import Axis, along_axes, angles_along, octaves, over_grid
from ..attention.positions import Extension
from ..compat import names_from
from .family import own_positions

QwenEmbedRope: Any
(QwenEmbedRope,) = names_from(
    "diffusers.models.transformers.transformer_qwenimage", "QwenEmbedRope"
)

# (frames, rows, columns) of an image, in tokens.
Shape = tuple[int, int, int]


class CentredAxis(Axis):
    """An axis with the middle of an image at 0, or right before it."""

    def scaled(self, positions: torch.Tensor, factor: float) -> torch.Tensor:
        """`Axis.scaled`, from the first position of the trained extent."""
        if self.factor == 1:
            return positions
        tokens, extent = len(positions), self._trained_extent(len(positions), factor)
        first, trained_first = tokens // 2 - tokens, extent // 2 - extent
        return (positions - first) / factor + self.margin + trained_first

    def end(self, tokens: int, factor: float | None) -> float:
        """Where text follows on an image, in positions of the trained extent.

        Args:
            factor: of scaled positions ("two"); None for true ones.
        """
        if factor is not None and self.factor != 1:
            return self._trained_extent(tokens, factor) // 2
        return tokens // 2 / self.shrinks

    @property
    def shrinks(self) -> float:
        """By what its frequencies make an image shorter: the slow ones, with "yarn"."""
        return self.factor if self.method in ("yarn", "interpolation") else 1.0

    def _trained_extent(self, tokens: int, factor: float) -> int:
        return round((tokens - 1) / factor + 1 + 2 * self.margin)


def centred(axes: Sequence[Axis]) -> list[CentredAxis]:
    """The same axes with the middle of an image at 0."""
    return [CentredAxis(**vars(axis)) for axis in axes]


class ExtendedQwenEmbedRope(nn.Module):
    """Stands in for `QwenEmbedRope`, without an end; bit for bit the same with factors of 1.

    Text begins where the image ends, as in training: where positions are divided ("interpolation",
    slow pairs of "yarn", the scaled ones of "two"), where the image ends by these; else at the true
    end. From one token of text to the next positions are true. With "two" the image keeps a
    `MARGIN` at both ends of the trained extent, and reference images keep their positions.

    Args:
        stock: what it stands in for.
        extension: how positions are extended.
    """

    def __init__(self, stock: Any, extension: Extension) -> None:
        super().__init__()
        self.theta: Any = stock.theta
        self.axes_dim: Any = stock.axes_dim
        self.extension = extension
        self.axes: list[CentredAxis] = centred(extension.axes(self.theta, self.axes_dim, rows=1))

    def forward(
        self,
        video_fhw: Any,
        device: torch.device | None = None,
        max_txt_seq_len: int | torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The tables of images and text; arguments are the stock module's.

        Returns:
            (image + references, k * sum(axes_dim) / 2) and (text, the same), complex64; k is 1, and
            more with "two".
        """
        assert max_txt_seq_len is not None
        shapes, text_length = image_shapes(video_fhw), int(max_txt_seq_len)
        image, *others = (positions_of(shape, place) for place, shape in enumerate(shapes))
        gain = self.extension.gain(sum(f * h * w for f, h, w in shapes) + text_length)
        of_images, of_text = list[torch.Tensor](), list[torch.Tensor]()
        scalings = (None,) * len(self.axes), *octaves(self.axes)
        for along, factors in zip(along_axes(self.axes, image), scalings, strict=True):
            grids = [angles_along(self.axes, each, torch.float32) for each in (along, *others)]
            # By way of the CPU, where the stock tables are made.
            tables = [[_rotations(one, gain).to(device) for one in grid] for grid in grids]
            of_images.append(torch.cat([over_grid(grid) for grid in tables]))
            start = self._text_start(shapes, factors)
            of_text.append(_rotations(self._text_angles(start, text_length), gain).to(device))
        return torch.cat(of_images, dim=1), torch.cat(of_text, dim=1)

    def _text_start(self, shapes: list[Shape], factors: tuple[float | None, ...]) -> float:
        """Where text begins, in positions of the trained extent."""
        return max(
            axis.end(tokens, factor if place == 0 else None)
            for place, (_, *sides) in enumerate(shapes)
            for axis, tokens, factor in zip(self.axes[1:], sides, factors[1:], strict=True)
        )

    def _text_angles(self, start: float, length: int) -> torch.Tensor:
        places = torch.arange(length, device="cpu")
        parts = []
        for axis in self.axes:
            trained = replace(axis, method="none").frequencies(torch.float32, places.device)
            here = axis.frequencies(torch.float32, places.device) * axis.shrinks
            # Bit for bit the stock table's where both frequencies are the same.
            parts.append(torch.outer(start + places, trained) + start * (here - trained))
        return torch.cat(parts, dim=1)


def positions_of(shape: Shape, place: int) -> list[torch.Tensor]:
    """Of an image on every axis, by its place among the images."""
    frames, *sides = shape
    from_the_middle = (
        torch.arange(tokens, device="cpu") - (tokens - tokens // 2) for tokens in sides
    )
    return [torch.arange(place, place + frames, device="cpu"), *from_the_middle]


def _rotations(angles: torch.Tensor, gain: float) -> torch.Tensor:
    return torch.polar(torch.full_like(angles, gain), angles)


def image_shapes(shapes: Any) -> list[Shape]:
    """Of the image and the reference images: of the first of a batch, as in `img_shapes`."""
    first = shapes[0] if isinstance(shapes, list) else shapes
    return first if isinstance(first, list) else [first]


def extend(model: Any, extension: Extension) -> dict[str, Any]:
    """`Family.extend`."""
    positions = own_positions(model, "pos_embed", QwenEmbedRope, ExtendedQwenEmbedRope)
    return {"pos_embed": ExtendedQwenEmbedRope(positions, extension)}
