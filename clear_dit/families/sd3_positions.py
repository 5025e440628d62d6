"""SD3's positions: a table of so many rows and columns, of which an image has the middle."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..attention.positions import Extension
from ..compat import names_from
from .family import own_positions

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
        rows, columns = (
            _cubic_weights(size // self.stock.patch_size, factor, side, stored.device)
            for size, factor in zip((height, width), self.factors, strict=True)
        )
        table = stored.float().unflatten(1, (side, side))
        resampled = torch.einsum("hi,wj,bijc->bhwc", rows, columns, table)
        return resampled.flatten(1, 2).to(stored.dtype)


def _cubic_weights(tokens: int, factor: float, side: int, device: torch.device) -> torch.Tensor:
    """Of a table's entries along one side in those of an image, (tokens, side), float32.

    Positions before the first and behind the last entry have its value.
    """
    first = (side - tokens / factor) // 2  # as the stock table is cropped
    middles = torch.arange(tokens, dtype=torch.float32, device=device) + 0.5
    positions = first + middles / factor - 0.5
    weights = positions.new_zeros(tokens, side)
    for step in range(-1, 3):
        place = positions.floor() + step
        weight = _cubic((positions - place).abs())
        weights.scatter_add_(1, place.clamp(0, side - 1).long()[:, None], weight[:, None])
    return weights


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
