"""Qwen-Image 2.1's positions beyond those it was trained with, and beyond its stored table.

Text advances along all three axes. An image stands at one place of the first, behind the text
before it, with its centre at 0 on the others; text after it goes on behind its longer side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..attention.axes import along_axes, angles_along, over_grid
from ..attention.positions import Extension
from ..compat import names_from
from .family import own_positions
from .qwen_positions import CentredAxis, Shape, centred, positions_of

QwenImage21Rope: Any
(QwenImage21Rope,) = names_from(
    "diffusers.models.transformers.transformer_qwenimage21", "QwenImage21Rope"
)


class ExtendedQwenImage21Rope(nn.Module):
    """Stands in for `QwenImage21Rope`, without an end; bit for bit the same with factors of 1.

    Images alone are extended: text, whose positions do not depend on the size of the image behind
    it, keeps them. With "two" the image keeps a `MARGIN` at both ends of the trained extent, whose
    centre is where it was; reference images keep their positions.

    Args:
        stock: what it stands in for.
        extension: how positions are extended.
    """

    def __init__(self, stock: Any, extension: Extension) -> None:
        super().__init__()
        self.theta: Any = stock.theta
        self.axes_dim: Any = stock.axes_dim
        self.axes: list[CentredAxis] = centred(extension.axes(self.theta, self.axes_dim, rows=1))
        self._of_text = [replace(axis, method="none") for axis in self.axes]

    def forward(
        self, img_shapes: Sequence[Shape], image_pad_mask: torch.Tensor, device: torch.device
    ) -> torch.Tensor:
        """The table of a sequence; arguments are the stock module's.

        Returns:
            (prefix + image, k * sum(axes_dim) / 2), complex64; k is 1, and more with "two".
        """
        slots, position, cursor = image_pad_mask.tolist(), 0, 0
        before, scaled = list[torch.Tensor](), list[list[torch.Tensor]]()
        for shape in img_shapes:
            _, rows, columns = shape
            start = slots.index(True, cursor)
            before.append(self._text(position, start - cursor))
            position += start - cursor
            # Of the last one, the image to be made, by every factor.
            scaled = along_axes(self.axes, positions_of((1, rows, columns), position))
            before.append(self._image(scaled[0]))
            position, cursor = position + max(rows, columns), start + rows * columns
        *before, _ = before
        behind = self._text(position, len(slots) - cursor)
        angles = [torch.cat([*before, self._image(along), behind]) for along in scaled]
        return torch.cat([torch.polar(torch.ones_like(each), each) for each in angles], 1).to(
            device
        )

    def _text(self, start: int, length: int) -> torch.Tensor:
        places = torch.arange(start, start + length, device="cpu")
        return torch.cat(angles_along(self._of_text, [places] * 3, torch.float32), dim=1)

    def _image(self, positions: Sequence[torch.Tensor]) -> torch.Tensor:
        return over_grid(angles_along(self.axes, positions, torch.float32))


def extend(model: Any, extension: Extension) -> dict[str, Any]:
    """`Family.extend`."""
    positions = own_positions(model, "pos_embed", QwenImage21Rope, ExtendedQwenImage21Rope)
    return {"pos_embed": ExtendedQwenImage21Rope(positions, extension)}
