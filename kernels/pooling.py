"""Pooled keys and values: of CLEAR's `down_factor` variant (arXiv 2412.16112, section 3.2), and far
keys (cells.py), which are pooled level from level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from .cells import cell_count, tokens_of_cells
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


def pooled_keys(
    key: torch.Tensor, value: torch.Tensor, window: Window, spatial_weight: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pooled key and value of a window whose image is whole, (batch, pooled, heads, head_dim) each.

    Args:
        key, value: (batch, text + image, heads, head_dim).
        window: without `key_rows`; no pooled tokens where it has neither pooled nor far keys.
        spatial_weight: as in `pool_tokens`, or as in `pool_cells`.
    """
    if window.far_levels:
        text = window.text_length
        sizes = window.height, window.width, window.far_levels
        key, value = (pool_cells(x[:, text:], spatial_weight, *sizes) for x in (key, value))
        return key, value
    if window.down_factor > 1:
        key, value = (pool_tokens(x, window, spatial_weight) for x in (key, value))
        return key, value
    empty = key.new_empty(key.shape[0], 0, *key.shape[2:])
    return empty, empty


def pooled_bias(
    window: Window, heads: int, far_offset: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """What is added to the scaled scores of every pooled key, float32 (pooled, heads).

    The log of the tokens it stands for and, for far keys, an offset of its level and head.

    Args:
        far_offset: (far_levels or more, heads); 0 where None.

    Returns:
        (0, heads) where nothing is added: pooled keys that weigh as one, or none.
    """
    if not window.far_levels and window.pooled_weight == "one":
        return torch.empty(0, heads, device=device)
    rows = [size for one in window.key_rows or () for size in one]
    counts = _log_counts(
        window.height, window.width, window.down_factor, window.far_levels, rows, device
    )
    bias = counts[:, None].expand(-1, heads)
    if far_offset is None or not window.far_levels:
        return bias
    levels = range(1, window.far_levels + 1)
    parts = [
        far_offset[level - 1].float().expand(window.cells_of_level(level), heads)
        for level in levels
    ]
    return bias + torch.cat(parts)


def pool_cells(
    image: torch.Tensor,
    weight: torch.Tensor | None,
    height: int,
    width: int,
    levels: int,
) -> torch.Tensor:
    """The cells of every level, each pooled from the level below it.

    A cell is the mean of its tokens: the mean of its (up to) 2 x 2 children, each counted as often
    as it has tokens. `weight` learns it: a child's share is then times 4 times its weight.

    Args:
        image: (batch, height * width, heads, head_dim), in raster order.
        weight: (levels or more, 2, 2), by the child's place; 1 / 4 each where None.

    Returns:
        (batch, cells, heads, head_dim) in the dtype of `image`, level after level, each in raster
        order; summed in float32 or wider.
    """
    if weight is None:
        return _pool_cells(
            image, image.new_empty(0, 2, 2, dtype=torch.float32), height, width, levels
        )
    return _pool_cells(image, weight[:levels], height, width, levels)


def pool_cell_rows(
    image: torch.Tensor,
    weight: torch.Tensor | None,
    height: int,
    width: int,
    levels: int,
    rows: range,
) -> list[torch.Tensor]:
    """What some rows of the image contribute to the cells of every level: parts of a cell add up.

    Pooling is linear: a token's share of a cell, and so that of a part of a cell, depends on where
    it lies alone. The parts of `pool_cells` that all rows make add up to the cells.

    Args:
        image: (batch, rows * width, heads, head_dim), the tokens of these rows.
        weight, height, width, levels: as in `pool_cells`, of the whole image.
        rows: which they are, at least one.

    Returns:
        Level by level (batch, rows of cells, columns, heads, head_dim) in float32 or wider, for the
        rows of cells from rows.start // 2^level to the one that has the last row.
    """
    weight = image.new_empty(0, 2, 2) if weight is None else weight[:levels]
    return _pyramid(image, weight, height, width, levels, rows)[1:]


def _cell_shares(
    height: int, width: int, level: int, weight: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Share of the cells of level - 1 in the one around, (rows of level, 2, columns, 2).

    0 where there is no such child. The second is what they are times a child's weight.
    """
    axes = []
    for size in (height, width):
        tokens = tokens_of_cells(size, level - 1, weight.device).to(dtype)
        tokens = F.pad(tokens, (0, 2 * cell_count(size, level) - len(tokens))).unflatten(0, (-1, 2))
        axes.append(tokens / tokens.sum(1, keepdim=True))
    share = axes[0][:, :, None, None] * axes[1][None, None]
    if not len(weight):
        return share, share
    return share * 4 * weight[level - 1].to(dtype)[None, :, None, :], share * 4


# A child's place in the cell around it.
_PLACES = ((0, 0), (0, 1), (1, 0), (1, 1))


def _pyramid(
    image: torch.Tensor,
    weight: torch.Tensor,
    height: int,
    width: int,
    levels: int,
    given: range | None = None,
) -> list[torch.Tensor]:
    """Tokens, then the cells of every level, (batch, rows, columns, heads, head_dim) each.

    given: the image's rows that there are; what they contribute to the rows of cells they lie in.
    """
    given = range(height) if given is None else given
    start, stop = given.start, given.stop
    dtype = torch.promote_types(image.dtype, torch.float32)
    found = [image.unflatten(1, (stop - start, width))]
    for level in range(1, levels + 1):
        below = found[-1]
        odd, start, stop = start % 2, start // 2, cell_count(stop, 1)
        share, _ = _cell_shares(height, width, level, weight, dtype)
        share = share[start:stop]
        shape = below.shape[0], share.shape[0], share.shape[2], *below.shape[3:]
        cells = below.new_zeros(shape, dtype=dtype)
        # Child by child: at most a quarter of the tokens is wide at a time.
        for i, j in _PLACES:
            # The first cell has no upper children where the first row is an odd one.
            first = 1 if odd and i == 0 else 0
            children = below[:, (i + odd) % 2 :: 2, j::2]
            rows, columns = first + children.shape[1], children.shape[2]
            own = share[first:rows, i, :columns, j, None, None]
            cells[:, first:rows, :columns].addcmul_(children, own)
        found.append(cells)
    return found


# Opaque: torch.compile would make constants of what is odd or even about a size.
@torch.library.custom_op("clear_dit::pool_cells", mutates_args=())
def _pool_cells(
    image: torch.Tensor, weight: torch.Tensor, height: int, width: int, levels: int
) -> torch.Tensor:
    cells = _pyramid(image, weight, height, width, levels)[1:]
    return torch.cat([each.flatten(1, 2).to(image.dtype) for each in cells], dim=1)


@_pool_cells.register_fake
def _(image, weight, height, width, levels):
    cells = sum(
        cell_count(height, level) * cell_count(width, level) for level in range(1, levels + 1)
    )
    return image.new_empty(image.shape[0], cells, *image.shape[2:])


@torch.library.custom_op("clear_dit::pool_cells_backward", mutates_args=())
def _pool_cells_backward(
    grad: torch.Tensor,
    image: torch.Tensor,
    weight: torch.Tensor,
    height: int,
    width: int,
    levels: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    found = _pyramid(image, weight, height, width, levels)
    grad_weight = torch.zeros_like(weight)
    parts = grad.split([each.shape[1] * each.shape[2] for each in found[1:]], dim=1)
    carried: torch.Tensor | None = None
    for level in range(levels, 0, -1):
        below, cells = found[level - 1], found[level]
        own_grad = parts[level - 1].unflatten(1, cells.shape[1:3]).to(cells.dtype)
        if carried is not None:
            own_grad = own_grad + carried
        share, by_weight = _cell_shares(height, width, level, weight, cells.dtype)
        carried = torch.empty_like(below, dtype=cells.dtype)
        for i, j in _PLACES:
            children = below[:, i::2, j::2]
            rows, columns = children.shape[1:3]
            part = own_grad[:, :rows, :columns]
            carried[:, i::2, j::2] = part * share[:rows, i, :columns, j, None, None]
            if len(weight):
                of_children = (part * children).sum((0, 3, 4))
                total = (of_children * by_weight[:rows, i, :columns, j]).sum()
                grad_weight[level - 1, i, j] = total
    assert carried is not None
    return carried.flatten(1, 2).to(image.dtype), grad_weight


@_pool_cells_backward.register_fake
def _(grad, image, weight, height, width, levels):
    return torch.empty_like(image, memory_format=torch.contiguous_format), torch.empty_like(weight)


def _pooling_gradient(ctx: Any, grad: torch.Tensor) -> tuple:
    return *_pool_cells_backward(grad, *ctx.saved_tensors, *ctx.sizes), None, None, None


def _save(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.sizes = inputs[2:]


_pool_cells.register_autograd(_pooling_gradient, setup_context=_save)


@torch.library.custom_op("clear_dit::log_counts", mutates_args=())
def _log_counts(
    height: int,
    width: int,
    down_factor: int,
    far_levels: int,
    key_rows: Sequence[int],
    device: torch.device,
) -> torch.Tensor:
    parts = []
    if down_factor > 1:
        sizes = (torch.arange(0, size, down_factor, device=device) for size in (height, width))
        rows, columns = (
            (size - first).clamp(max=down_factor)
            for size, first in zip((height, width), sizes, strict=True)
        )
        parts.append(torch.outer(rows, columns))
    for level in range(1, far_levels + 1):
        rows, columns = (tokens_of_cells(size, level, device) for size in (height, width))
        if key_rows:
            rows = rows[key_rows[2 * level] : key_rows[2 * level + 1]]
        parts.append(torch.outer(rows, columns))
    return torch.cat([part.reshape(-1) for part in parts]).float().log()


@_log_counts.register_fake
def _(height, width, down_factor, far_levels, key_rows, device):
    count = 0
    if down_factor > 1:
        count = -(-height // down_factor) * -(-width // down_factor)
    for level in range(1, far_levels + 1):
        rows = cell_count(height, level)
        if key_rows:
            rows = key_rows[2 * level + 1] - key_rows[2 * level]
        count = count + rows * cell_count(width, level)
    return torch.empty(count, device=device)
