"""Pooled keys and values of CLEAR's `down_factor` variant (arXiv 2412.16112, section 3.2)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .window import Window


def pool_tokens(
    tokens: torch.Tensor, window: Window, spatial_weight: torch.Tensor | None
) -> torch.Tensor:
    """Weighted sum of the image tokens in every `down_factor` x `down_factor` cell.

    Cells start at the upper left corner. A last partial cell is summed over the tokens it has,
    times (cell size / tokens present): with the initial weights every cell is a mean, and where
    the grid divides evenly this is exactly the published model.

    Args:
        tokens: (batch, text + image, heads, head_dim), keys (after QK-norm and RoPE) or values.
        window: geometry, in tokens; `down_factor` > 1.
        spatial_weight: `down_factor`^2 weights in raster order, of shape (f, f) or
            (1, 1, 1, f, 1, f, 1); None means 1 / f^2 each.

    Returns:
        (batch, pooled, heads, head_dim), in the dtype of `tokens`; summed in float32 or wider.
    """
    factor = window.down_factor
    rows, columns = math.ceil(window.height / factor), math.ceil(window.width / factor)
    batch, _, heads, head_dim = tokens.shape
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    if spatial_weight is None:
        weight = torch.full((factor, factor), factor**-2, dtype=dtype, device=tokens.device)
    else:
        weight = spatial_weight.reshape(factor, factor).to(dtype)

    image = tokens[:, window.text_length :].unflatten(1, (window.height, window.width))
    pad_rows, pad_columns = rows * factor - window.height, columns * factor - window.width
    if pad_rows or pad_columns:
        image = F.pad(image, (0, 0, 0, 0, 0, pad_columns, 0, pad_rows))
    cells = image.reshape(batch, rows, factor, columns, factor, heads, head_dim).to(dtype)
    pooled = torch.einsum("brycxhd,yx->brchd", cells, weight)

    last_row, last_column = factor - pad_rows, factor - pad_columns
    share = torch.ones(rows, columns, dtype=dtype, device=tokens.device)
    share[-1, :] *= factor / last_row
    share[:, -1] *= factor / last_column
    pooled = pooled * share[:, :, None, None]
    return pooled.flatten(1, 2).to(tokens.dtype)
