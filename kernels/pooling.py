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
    image = tokens[:, window.text_length :]
    return pool_rows(image, window, spatial_weight, range(window.height)).to(tokens.dtype)


def pool_rows(
    image: torch.Tensor, window: Window, spatial_weight: torch.Tensor | None, rows: range
) -> torch.Tensor:
    """What some rows of the image contribute to its cells: parts of a cell add up.

    Args:
        image: (batch, rows * width, heads, head_dim), the tokens of these rows.
        window, spatial_weight: as in `pool_tokens`, of the whole image.
        rows: which they are.

    Returns:
        (batch, cells, heads, head_dim) in float32 or wider, for the rows of cells from
        rows.start // down_factor to the one that has the last row.
    """
    factor = window.down_factor
    columns = math.ceil(window.width / factor)
    first, last = rows.start // factor, math.ceil(rows.stop / factor)
    batch, _, heads, head_dim = image.shape
    dtype = torch.promote_types(image.dtype, torch.float32)
    if spatial_weight is None:
        weight = torch.full((factor, factor), factor**-2, dtype=dtype, device=image.device)
    else:
        weight = spatial_weight.reshape(factor, factor).to(dtype)

    image = image.unflatten(1, (len(rows), window.width))
    above, below = rows.start - first * factor, last * factor - rows.stop
    pad_columns = columns * factor - window.width
    if above or below or pad_columns:
        image = F.pad(image, (0, 0, 0, 0, 0, pad_columns, above, below))
    cells = image.reshape(batch, last - first, factor, columns, factor, heads, head_dim).to(dtype)
    pooled = torch.einsum("brycxhd,yx->brchd", cells, weight)

    share = torch.ones(last - first, columns, dtype=dtype, device=image.device)
    if last * factor > window.height:
        share[-1, :] *= factor / (window.height - (last - 1) * factor)
    share[:, -1] *= factor / (factor - pad_columns)
    pooled = pooled * share[:, :, None, None]
    return pooled.flatten(1, 2)
