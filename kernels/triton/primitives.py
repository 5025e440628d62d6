"""What the attention kernels share: tiles of tokens, the disc, the online softmax.

Names: M owner tokens of a program, N visited tokens of a step, D channels (a power of two), R x C
the rows and columns of a tile. Scores are in units of log2, so that exp2 serves.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Of a row that has met no key yet: finite, so that the first masked keys do no harm.
LOWEST = tl.constexpr(-1.0e38)


@triton.jit
def tile_rows(R: tl.constexpr, C: tl.constexpr):
    """Row of every token of a tile, int32 [R * C]."""
    return tl.arange(0, R * C) // C


@triton.jit
def tile_columns(R: tl.constexpr, C: tl.constexpr):
    """Column of every token of a tile, int32 [R * C]."""
    return tl.arange(0, R * C) % C


@triton.jit
def load_rows(pointer, stride, tokens, valid, head_dim, D: tl.constexpr, EVEN_D: tl.constexpr):
    """Tokens of one head, [tokens, D]; zero where not `valid` and beyond `head_dim`."""
    channel = tl.arange(0, D)
    pointers = pointer + tokens.to(tl.int64)[:, None] * stride + channel[None, :]
    if EVEN_D:
        return tl.load(pointers, mask=valid[:, None], other=0.0)
    return tl.load(pointers, mask=valid[:, None] & (channel < head_dim)[None, :], other=0.0)


@triton.jit
def store_rows(
    pointer, stride, tokens, valid, value, head_dim, D: tl.constexpr, EVEN_D: tl.constexpr
):
    """Inverse of `load_rows`, in the dtype of `pointer`."""
    channel = tl.arange(0, D)
    pointers = pointer + tokens.to(tl.int64)[:, None] * stride + channel[None, :]
    mask = valid[:, None]
    if not EVEN_D:
        mask = mask & (channel < head_dim)[None, :]
    tl.store(pointers, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_bias(bias, stride, tokens, valid, BIAS: tl.constexpr):
    """What is added to the scores of tokens of one head, in units of log2; 0 where not `valid`.

    One 0 without BIAS: Triton 3.6 lets no function return None.
    """
    if BIAS:
        return tl.load(bias + tokens.to(tl.int64) * stride, mask=valid, other=0.0) * LOG2_E
    else:
        return 0.0


@triton.jit
def disc_mask(
    own_y, own_x, y, x, height, width, radius,
    M: tl.constexpr, R: tl.constexpr, C: tl.constexpr, CLIP: tl.constexpr = True,
):  # fmt: skip
    """Which tokens of the R x C tile at (y, x) the owners' discs contain, bool [M, R * C].

    Rows and columns are squared apart, so that one comparison is left for each pair. What lies
    beyond the border is put where no disc reaches; without CLIP the caller sees to the border.
    """
    visited_y = y + tl.arange(0, R)
    visited_x = x + tl.arange(0, C)
    if CLIP:
        visited_y = tl.where((visited_y >= 0) & (visited_y < height), visited_y, -radius)
        visited_x = tl.where((visited_x >= 0) & (visited_x < width), visited_x, -radius)
    dy = own_y[:, None] - visited_y[None, :]  # [M, R]
    dx = own_x[:, None] - visited_x[None, :]  # [M, C]
    room = radius * radius - dy * dy
    inside = (dx * dx)[:, None, :] < room[:, :, None]
    return tl.reshape(inside, [M, R * C])


@triton.jit
def online_softmax(scores, row_max, row_sum, scale_log2):
    """One step of softmax over keys that arrive block by block (arXiv 2205.14135, algorithm 1).

    scores: [M, N], to be multiplied by `scale_log2`, which is above 0: the largest stays the
    largest, and one multiply-add is left for each pair. Maxima are in units of log2: were they
    scaled anew in every step, the roundings of many steps would add up in the factors.

    Returns the block's unnormalised probabilities, the factor for what was summed before, and the
    new maximum and sum of each row.
    """
    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
    factor = tl.exp2(row_max - new_max)
    probability = tl.exp2(scores * scale_log2 - new_max[:, None])
    return probability, factor, new_max, row_sum * factor + tl.sum(probability, 1)


@triton.jit
def store_softmax(
    out, lse, tokens, valid, row_max, row_sum, acc, heads, head_dim,
    D: tl.constexpr, EVEN_D: tl.constexpr,
):  # fmt: skip
    """Output and natural-log log-sum-exp of [M] queries of a head, contiguous but for the heads.

    A query that has met no key gets output 0 and a log-sum-exp of about `LOWEST`.
    """
    row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
    store_rows(out, heads * head_dim, tokens, valid, acc / row_sum[:, None], head_dim, D, EVEN_D)
    logsumexp = (row_max + tl.log2(row_sum)) * LN_2
    tl.store(lse + tokens.to(tl.int64) * heads, logsumexp, mask=valid)
