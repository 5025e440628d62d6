"""Pooled keys and values: of CLEAR's `down_factor` variant (arXiv 2412.16112, section 3.2), and far
keys (cells.py), which are pooled level from level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .cells import cell_count, tokens_of_cells
from .namespace import NAMESPACE
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
    key: torch.Tensor,
    value: torch.Tensor,
    window: Window,
    spatial_weight: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pooled key and value of a window whose image is whole, (batch, pooled, heads, head_dim) each.

    Args:
        key, value: (batch, text + image, heads, head_dim).
        window: without `key_rows`; no pooled tokens where it has neither pooled nor far keys.
        spatial_weight: as in `pool_tokens`, or as in `pool_cells`.
        scale: factor on query times key, which far keys are weighted with.
    """
    if window.far_levels:
        text = window.text_length
        sizes = window.height, window.width, window.far_levels
        return pool_cells(key[:, text:], value[:, text:], spatial_weight, *sizes, scale)
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
        heads: of the query, each of which has an offset of its own.
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
    key: torch.Tensor,
    value: torch.Tensor,
    weight: torch.Tensor | None,
    height: int,
    width: int,
    levels: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value of the cells of every level, each pooled from the level below it.

    A cell is the mean of its tokens, weighted by the softmax of scale * |key|^2 over them, of every
    head: long keys dominate what its tokens would add to a query's softmax. It is made of its (up
    to) 2 x 2 children, whose shares are what the weights of their tokens add up to. `weight` learns
    it: a child's share is then times 4 times its weight.

    Args:
        key, value: (batch, height * width, heads, head_dim), in raster order.
        weight: (levels or more, 2, 2), by the child's place; 1 / 4 each where None.
        scale: factor on query times key.

    Returns:
        Two of (batch, cells, heads, head_dim) in the dtype of `key`, level after level, each in
        raster order; summed in float32 or wider.

    Raises:
        ValueError: a value or a weight of another shape or dtype.
    """
    if value.shape != key.shape or value.dtype != key.dtype:
        raise ValueError(
            f"pool_cells: value must be as the key, {tuple(key.shape)}, {key.dtype}; got "
            f"{tuple(value.shape)}, {value.dtype}."
        )
    return pool_cells_op(key, value, _given(weight, levels, key), height, width, levels, scale)


def pool_cell_rows(
    key: torch.Tensor,
    value: torch.Tensor,
    weight: torch.Tensor | None,
    width: int,
    levels: int,
    scale: float,
    rows: range,
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The cells of every level made of some rows of the image alone: parts of the whole cells.

    The sum of a cell's parts times their `shares` is what `pool_cells` makes of all rows.

    Args:
        key, value: (batch, rows * width, heads, head_dim), the tokens of these rows.
        weight, width, levels, scale: as in `pool_cells`.
        rows: which of the whole image's they are, at least one.

    Returns:
        Level by level key and value, (batch, rows of cells, columns, heads, head_dim), and largest
        and mass as `shares` takes them, without head_dim; in float32 or wider, for the rows of
        cells from rows.start // 2^level to the one that has the last row.
    """
    levels_of = _pyramid(key, value, _given(weight, levels, key), width, levels, scale, rows.start)
    return [(level.key, level.value, level.largest, level.mass) for level in levels_of[1:]]


def shares(
    largest: torch.Tensor, mass: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What parts weigh in the whole: the softmax over all tokens, summed over those of a part.

    With the largest apart nothing overflows, and no number is rounded for being large.

    Args:
        largest: (parts, ...), of scale * |key|^2 of a part's tokens; -inf where there is no part.
        mass: (parts, ...), the sum of exp(scale * |key|^2 - largest) over them; 0 likewise.

    Returns:
        The shares, (parts, ...), and largest and mass of the whole, (...).
    """
    of_whole = largest.amax(0)
    masses = mass * (largest - of_whole).exp_()
    total = masses.sum(0)
    return masses / total, of_whole, total


def _given(weight: torch.Tensor | None, levels: int, key: torch.Tensor) -> torch.Tensor:
    """An operator's weights: none of them means 1 / 4 each."""
    if weight is not None and (len(weight) < levels or weight.shape[1:] != (2, 2)):
        raise ValueError(
            f"pool_cells: weight must be ({levels} or more, 2, 2), got {tuple(weight.shape)}."
        )
    return key.new_empty(0, 2, 2, dtype=torch.float32) if weight is None else weight[:levels]


class _Level(NamedTuple):
    """Tokens, or the cells of a level made of them.

    Attributes:
        key, value: (batch, rows, columns, heads, head_dim).
        largest, mass: of their tokens, (batch, rows, columns, heads); see `shares`.
        share: of the level below in these cells, (4 places, batch, rows, columns, heads); 0 where
            there is no such child. Before its learned weight.
    """

    key: torch.Tensor
    value: torch.Tensor
    largest: torch.Tensor
    mass: torch.Tensor
    share: torch.Tensor


# A child's place in the cell around it.
_PLACES = ((0, 0), (0, 1), (1, 0), (1, 1))


def _learned(weight: torch.Tensor, level: int, place: int, dtype: torch.dtype) -> Any:
    """Factor on the shares of a level's children at a place."""
    return 4 * weight[level - 1].flatten()[place].to(dtype) if len(weight) else 1


def _pyramid(
    key: torch.Tensor,
    value: torch.Tensor,
    weight: torch.Tensor,
    width: int,
    levels: int,
    scale: float,
    start: int = 0,
) -> list[_Level]:
    """Tokens, then the cells of every level; start: the whole image's row that is the first."""
    dtype = torch.promote_types(key.dtype, torch.float32)
    key, value = (x.unflatten(1, (-1, width)) for x in (key, value))
    # By quarters of the rows: a CPU makes a wide copy of what it takes the norm of.
    lengths = [torch.linalg.vector_norm(part, dim=-1, dtype=dtype) for part in key.chunk(4, dim=1)]
    largest = torch.cat(lengths, dim=1).square_().mul_(scale)
    found = [_Level(key, value, largest, torch.ones_like(largest), largest.new_empty(0))]
    for level in range(1, levels + 1):
        below = found[-1]
        # The first cell has no upper children where the first row is an odd one.
        odd, start = start % 2, start // 2
        share, largest, mass = shares(
            _by_place(below.largest, odd, float("-inf")), _by_place(below.mass, odd, 0)
        )
        pooled = [x.new_zeros(*mass.shape, x.shape[-1], dtype=dtype) for x in below[:2]]
        # Child by child: at most a quarter of the tokens is wide at a time.
        for place, (i, j) in enumerate(_PLACES):
            first = 1 if odd and i == 0 else 0
            own = (share[place] * _learned(weight, level, place, dtype))[..., None]
            for cells, tokens in zip(pooled, below[:2], strict=True):
                children = tokens[:, (i + odd) % 2 :: 2, j::2]
                inside = slice(first, first + children.shape[1]), slice(children.shape[2])
                cells[:, *inside].addcmul_(children, own[:, *inside])
        found.append(_Level(pooled[0], pooled[1], largest, mass, share))
    return found


def _by_place(x: torch.Tensor, odd: int, none: float) -> torch.Tensor:
    """(batch, rows, columns, heads) of cells, in the cells around: with 4 places in front.

    odd: whether the first row is an odd one; none: what stands for children that there are not.
    """
    rows, columns = x.shape[1:3]
    x = F.pad(x, (0, 0, 0, columns % 2, odd, (odd + rows) % 2), value=none)
    x = x.unflatten(1, (-1, 2)).unflatten(3, (-1, 2))
    return x.permute(2, 4, 0, 1, 3, 5).flatten(0, 1)


def pool_cells_by_operators(
    key: torch.Tensor,
    value: torch.Tensor,
    weight: torch.Tensor,
    height: int,
    width: int,
    levels: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`pool_cells` by PyTorch's operators, on any device; an empty weight stands for None."""
    cells = _pyramid(key, value, weight, width, levels, scale)[1:]
    pooled_key = torch.cat([each.key.flatten(1, 2).to(key.dtype) for each in cells], dim=1)
    pooled_value = torch.cat([each.value.flatten(1, 2).to(key.dtype) for each in cells], dim=1)
    return pooled_key, pooled_value


# Opaque: torch.compile would make constants of what is odd or even about a size. choice.py has
# kernels for it.
pool_cells_op: torch.library.CustomOpDef = torch.library.custom_op(
    f"{NAMESPACE}::pool_cells", pool_cells_by_operators, mutates_args=()
)


@pool_cells_op.register_fake
def _(key, value, weight, height, width, levels, scale):
    cells = sum(
        cell_count(height, level) * cell_count(width, level) for level in range(1, levels + 1)
    )
    shape = key.shape[0], cells, *key.shape[2:]
    return key.new_empty(shape), key.new_empty(shape)


@torch.library.custom_op(f"{NAMESPACE}::pool_cells_backward", mutates_args=())
def _pool_cells_backward(
    grad_key: torch.Tensor,
    grad_value: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    weight: torch.Tensor,
    width: int,
    levels: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    found = _pyramid(key, value, weight, width, levels, scale)
    grad_weight = torch.zeros_like(weight)
    sizes = [each.key.shape[1] * each.key.shape[2] for each in found[1:]]
    parts = list(zip(grad_key.split(sizes, 1), grad_value.split(sizes, 1), strict=True))
    above: list[torch.Tensor] = []  # gradients of the level by way of those above it
    of_log = torch.zeros_like(found[-1].mass)  # of the logarithm of what cells weigh
    for level in range(levels, 0, -1):
        below, cells = found[level - 1], found[level]
        grads = [part.unflatten(1, cells.mass.shape[1:3]).to(of_log.dtype) for part in parts.pop()]
        if above:
            grads = [grad + more for grad, more in zip(grads, above, strict=True)]
        above = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in below[:2]]
        of_children = torch.empty_like(below.mass)
        # A child's share grows with its weight, at the expense of the cell's other children.
        others = _products(grads, cells[:2]) - of_log
        for place, (i, j) in enumerate(_PLACES):
            here = slice(None), slice(i, None, 2), slice(j, None, 2)
            children = [x[here] for x in below[:2]]
            inside = slice(None), slice(children[0].shape[1]), slice(children[0].shape[2])
            share, learned = (
                cells.share[place][inside],
                _learned(weight, level, place, of_log.dtype),
            )
            of_place = [grad[inside] for grad in grads]
            of_share = share * _products(of_place, children)
            if len(weight):
                grad_weight[level - 1, i, j] = 4 * of_share.sum()
            of_children[here] = own = of_share * learned - share * others[inside]
            of_key, of_value = (grad * (share * learned)[..., None] for grad in of_place)
            if level == 1:  # children are tokens, whose weight is exp(scale * |key|^2)
                of_key += children[0] * (2 * scale * own)[..., None]
            above[0][here], above[1][here] = of_key, of_value
        of_log = of_children
    return above[0].flatten(1, 2), above[1].flatten(1, 2), grad_weight


def _products(ones: list[torch.Tensor], others: Sequence[torch.Tensor]) -> torch.Tensor:
    """Inner products over head_dim, of keys and values together."""
    key, value = ((one * other).sum(-1) for one, other in zip(ones, others, strict=True))
    return key + value


@_pool_cells_backward.register_fake
def _(grad_key, grad_value, key, value, weight, width, levels, scale):
    of_key, of_value = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (key, value)
    )
    return of_key, of_value, torch.empty_like(weight)


def _pooling_gradient(ctx: Any, grad_key: torch.Tensor, grad_value: torch.Tensor) -> tuple:
    grads = _pool_cells_backward(grad_key, grad_value, *ctx.saved_tensors, *ctx.sizes)
    return *grads, None, None, None, None


def _save(ctx: Any, inputs: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.sizes = inputs[4:]


pool_cells_op.register_autograd(_pooling_gradient, setup_context=_save)


@torch.library.custom_op(f"{NAMESPACE}::log_counts", mutates_args=())
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
