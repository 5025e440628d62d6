"""The cells of far keys (kernels/pooling.py), pooled by Triton: three levels a launch.

A program makes the cells of one head over a tile of 8 x 8 tokens. It takes them by the reversed
bits of their Morton order: index bits from the highest on are the lowest row bit, the lowest column
bit, the next row bit and so on. The four children of a cell are then a quarter of the tile apart,
tokens in the same thread, and every level is a sum over quarters. The tile's one cell of the third
level is kept in float32 beside the output: the next launch takes these cells as tokens.

Importing this module imports Triton. CPU tensors run in Triton's interpreter only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..cells import cell_count
from ..opaque import channels_contiguous
from .launch import OPTIONS, channels
from .primitives import LOWEST, load_rows, store_rows

# Levels of a launch: of a tile of 2^3 x 2^3 tokens, whose keys and values are in registers.
TILE_LEVELS = 3


@triton.jit
def even_bits_reversed(index, BITS: tl.constexpr):
    """The BITS lowest even bits of an index as a number, the highest of them as its lowest."""
    found = index & 0
    for bit in tl.static_range(BITS):
        found |= ((index >> (2 * (BITS - 1 - bit))) & 1) << bit
    return found


@triton.jit
def tile_tokens(y, x, rows, columns, BITS: tl.constexpr):
    """Raster places of the tokens of a tile of 2^BITS x 2^BITS, and which are within the grid.

    y, x: the tile's place, in tiles. Returns two of [4^BITS].
    """
    index = tl.arange(0, 4**BITS)
    row = (y << BITS) + even_bits_reversed(index >> 1, BITS)
    column = (x << BITS) + even_bits_reversed(index, BITS)
    return row * columns + column, (row < rows) & (column < columns)


@triton.jit
def cell_shares(largest, mass, N: tl.constexpr):
    """`shares` of the children of N cells: [4 * N], and largest and mass of the cells, [N] each.

    Children that are not there have a largest of `LOWEST`, so that any other child outweighs them.
    """
    of_places = tl.reshape(largest, [4, N])
    largest = tl.max(of_places, 0)
    masses = tl.reshape(mass, [4, N]) * tl.exp(of_places - largest[None, :])
    mass = tl.sum(masses, 0)
    return tl.reshape(masses / mass[None, :], [4 * N]), largest, mass


@triton.jit
def weighted_sums(children, share, N: tl.constexpr, D: tl.constexpr):
    """[4 * N, D] children times their shares, summed to N cells, float32 [N, D]."""
    return tl.sum(tl.reshape(children.to(tl.float32) * share[:, None], [4, N, D]), 0)


# Sizes make no variants: every image has others, from launch to launch.
@triton.jit(do_not_specialize=["rows", "columns", "cells", "start", "levels", "level"])
def pool_tiles(
    key, value, below_largest, below_mass, weight, out_key, out_value,
    top_key, top_value, top_largest, top_mass,
    key_batch, key_token, key_head, value_batch, value_token, value_head,
    heads, head_dim, rows, columns, cells, start, levels, level, scale,
    LEVELS: tl.constexpr, D: tl.constexpr, EVEN_D: tl.constexpr,
):  # fmt: skip
    """Three levels of cells of what is given, their tokens: rows * columns of them for every head.

    Args:
        below_largest, below_mass: of these, float32 (batch, tokens, heads); None where they are
            the image's own.
        weight: (levels, 2, 2), contiguous, or None.
        out_key, out_value: (batch, cells, heads, head_dim), contiguous, of all levels.
        top_key, top_value, top_largest, top_mass: of the third level, float32 and contiguous as
            the next launch takes them; None if there is no next one.
        start: the first of these levels' cells in the output.
        level: of these tokens, of `levels` in all; there may be less than three above.
    """
    item = tl.program_id(0)
    head, tile = (item % heads).to(tl.int64), item // heads
    tiles_x = tl.cdiv(columns, 2**LEVELS)
    tiles = tl.cdiv(rows, 2**LEVELS) * tiles_x
    batch, tile = (tile // tiles).to(tl.int64), tile % tiles
    y, x = tile // tiles_x, tile % tiles_x

    tokens, inside = tile_tokens(y, x, rows, columns, LEVELS)
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head
    k = load_rows(key, key_token, tokens, inside, head_dim, D, EVEN_D).to(tl.float32)
    v = load_rows(value, value_token, tokens, inside, head_dim, D, EVEN_D)
    if below_largest is None:
        largest = tl.where(inside, scale * tl.sum(k * k, 1), LOWEST)
        mass = tl.full([4**LEVELS], 1.0, tl.float32)
    else:
        at = (batch * rows * columns + tokens) * heads + head
        largest = tl.load(below_largest + at, mask=inside, other=LOWEST)
        mass = tl.load(below_mass + at, mask=inside, other=1.0)

    out_key += (batch * cells * heads + head) * head_dim
    out_value += (batch * cells * heads + head) * head_dim
    for step in tl.static_range(1, LEVELS + 1):
        share, largest, mass = cell_shares(largest, mass, 4 ** (LEVELS - step))
        if weight is not None:
            place = tl.arange(0, 4 ** (LEVELS - step + 1)) // 4 ** (LEVELS - step)
            own = tl.minimum(level + step, levels) - 1  # there may be none of the third level
            learned = tl.load(weight + own * 4 + place)
            share *= 4.0 * learned.to(tl.float32)
        k = weighted_sums(k, share, 4 ** (LEVELS - step), D)
        v = weighted_sums(v, share, 4 ** (LEVELS - step), D)
        rows, columns = tl.cdiv(rows, 2), tl.cdiv(columns, 2)
        tokens, inside = tile_tokens(y, x, rows, columns, LEVELS - step)
        if level + step <= levels:
            store_rows(out_key, heads * head_dim, start + tokens, inside, k, head_dim, D, EVEN_D)
            store_rows(out_value, heads * head_dim, start + tokens, inside, v, head_dim, D, EVEN_D)
        start += rows * columns
    if top_key is not None:
        at = (batch * tiles + tokens) * heads + head
        store_rows(top_key, head_dim, at, inside, k, head_dim, D, EVEN_D)
        store_rows(top_value, head_dim, at, inside, v, head_dim, D, EVEN_D)
        tl.store(top_largest + at, largest)
        tl.store(top_mass + at, mass)


def pool_cells(
    key: torch.Tensor,
    value: torch.Tensor,
    weight: torch.Tensor,
    height: int,
    width: int,
    levels: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`pooling.pool_cells` of float16, bfloat16 or float32, any strides; summed in float32.

    Args:
        weight: (levels, 2, 2); (0, 2, 2) stands for 1 / 4 each.
    """
    key, value = channels_contiguous(key, value)
    batch, _, heads, head_dim = key.shape
    sizes = [cell_count(height, level) * cell_count(width, level) for level in range(levels + 1)]
    cells = sum(sizes[1:])
    pooled = [key.new_empty(batch, cells, heads, head_dim) for _ in range(2)]
    learned = weight.contiguous() if len(weight) else None
    below: tuple[torch.Tensor | None, ...] = key, value, None, None
    strides = *key.stride()[:3], *value.stride()[:3]
    for level in range(0, levels, TILE_LEVELS):
        rows, columns = cell_count(height, level), cell_count(width, level)
        tiles = cell_count(rows, TILE_LEVELS) * cell_count(columns, TILE_LEVELS)
        top: tuple[torch.Tensor | None, ...] = (None,) * 4
        if level + TILE_LEVELS < levels:
            shapes = (tiles, heads, head_dim), (tiles, heads)
            top = tuple(
                key.new_empty(batch, *shape, dtype=torch.float32)
                for shape in shapes
                for _ in range(2)
            )
        with torch.cuda.device_of(key):
            pool_tiles[(batch * tiles * heads,)](
                *below, learned, *pooled, *top, *strides, heads, head_dim, rows, columns,
                cells, sum(sizes[1 : level + 1]), levels, level, scale,
                LEVELS=TILE_LEVELS, **channels(head_dim),
                num_warps=4 if head_dim <= 128 else 8, **OPTIONS,
            )  # fmt: skip
        below = top
        strides = (tiles * heads * head_dim, heads * head_dim, head_dim) * 2
    return pooled[0], pooled[1]
