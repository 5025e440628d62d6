"""SD3's positions: a table of so many rows and columns, of which an image has the middle."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..attention.positions import MARGIN, Extension
from ..compat import names_from
from .family import own_positions

PatchEmbed: Any
(PatchEmbed,) = names_from("diffusers.models.embeddings", "PatchEmbed")


class ResampledPatchEmbed(nn.Module):
    """Stands in for `PatchEmbed`: an image gets as much of the table as a smaller one has.

    That is resampled by cubic convolution (Keys 1981, with PyTorch's a = -0.75).

    Args:
        stock: what it stands in for. It runs, with another part of its table.
        factors: for rows and for columns: tokens of the image to each of the table's.
    """

    def __init__(self, stock: Any, factors: tuple[float, float]) -> None:
        super().__init__()
        self.stock = stock
        self.factors = factors

    @property
    def limits(self) -> tuple[int, int]:
        """Rows and columns of the largest image, in tokens."""
        side = self.stock.pos_embed_max_size
        rows, columns = (int(round(side * factor, 6)) for factor in self.factors)
        return rows, columns

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        """(batch, image, channels) of latents, (batch, channels, height, width)."""
        vars(self.stock)["cropped_pos_embed"] = self._resampled
        try:
            out: torch.Tensor = self.stock(latent)
        finally:
            del vars(self.stock)["cropped_pos_embed"]
        return out

    def _resampled(self, height: int, width: int) -> torch.Tensor:
        """`PatchEmbed.cropped_pos_embed`: (1, image, channels) for latents of a size."""
        stored, side = self.stock.pos_embed, self.stock.pos_embed_max_size
        table = stored.float().unflatten(1, (side, side))
        for dim, size, factor in zip((1, 2), (height, width), self.factors, strict=True):
            table = _resampled_along(table, dim, size // self.stock.patch_size, factor)
        return table.flatten(1, 2).to(stored.dtype)


def _resampled_along(table: torch.Tensor, dim: int, tokens: int, factor: float) -> torch.Tensor:
    """A table of which one side has become that of an image, so many tokens.

    A larger image keeps `MARGIN` from both ends of the smaller one's positions: of several tokens
    at a border, a model draws lines along it.
    """
    side = table.shape[dim]
    first = (side - tokens / factor) // 2  # as the stock table is cropped
    places = torch.arange(tokens, dtype=torch.float32, device=table.device)
    if factor > 1:
        room = max(tokens / factor - 1 - 2 * MARGIN, 0)
        positions = first + MARGIN + places * (room / max(tokens - 1, 1))
    else:
        positions = first + (places + 0.5) / factor - 0.5
    shape = [-1 if one == dim else 1 for one in range(table.ndim)]
    resampled = torch.zeros((), device=table.device)
    for step in range(-1, 3):
        place = positions.floor() + step
        weight = _cubic((positions - place).abs()).view(shape)
        entries = table.index_select(dim, place.clamp(0, side - 1).long())
        resampled = resampled + weight * entries
    return resampled


def _cubic(distance: torch.Tensor, a: float = -0.75) -> torch.Tensor:
    """Keys' kernel at distances of 0 to 2 entries."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((distance - 5) * distance + 8) * distance * a - 4 * a
    return torch.where(distance <= 1, near, far)


def extend(model: Any, extension: Extension) -> dict[str, Any]:
    """`Family.extend`, for "none" and "interpolation"."""
    positions = own_positions(model, "pos_embed", PatchEmbed, ResampledPatchEmbed)
    stock = positions.stock if isinstance(positions, ResampledPatchEmbed) else positions
    computed = stock.pos_embed_max_size is None  # for the trained extent, whatever the size
    if computed or extension.rope == "none" or extension.rope_factors == (1.0, 1.0):
        return {"pos_embed": stock}
    return {"pos_embed": ResampledPatchEmbed(stock, extension.rope_factors)}
