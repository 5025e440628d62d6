"""Attention of image queries with far keys (see ../cells.py): keys come by number, from lists.

A program owns one tile of queries of one head, as in forward.py. Tokens and cells of every level
are keys of one list (cell_lists.py): without a mask those that all its queries see, with two
comparisons per pair the others.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .forward import attend_block, attend_run
from .primitives import LOWEST, load_bias, load_rows, store_softmax, tile_columns, tile_rows


@triton.jit
def own_tile(tile, tiles_x, start, stop, width, R: tl.constexpr, C: tl.constexpr):
    """First row and column of a tile of the image's rows start..stop, its tokens' rows and columns,
    and which exist.

    Beyond the border a token of the border stands in; it is not to be stored.
    """
    tile_y, tile_x = start + tile // tiles_x * R, tile % tiles_x * C
    own_y, own_x = tile_y + tile_rows(R, C), tile_x + tile_columns(R, C)
    valid = (own_y < stop) & (own_x < width)
    return tile_y, tile_x, tl.minimum(own_y, stop - 1), tl.minimum(own_x, width - 1), valid


@triton.jit
def load_listed(
    tokens, pooled, token_stride, pooled_stride, keys, token_keys, head_dim,
    D: tl.constexpr, EVEN_D: tl.constexpr,
):  # fmt: skip
    """Listed keys (or values) of one head, [N, D]: image tokens, or, from `token_keys` on, cells.

    tokens, pooled: pointers to the head's first image token and first pooled key.
    """
    channel = tl.arange(0, D)
    wide = keys.to(tl.int64)
    offsets = tl.where(keys < token_keys, wide * token_stride, (wide - token_keys) * pooled_stride)
    pointers = tl.where(keys < token_keys, tokens, pooled) + offsets
    if EVEN_D:
        return tl.load(pointers[:, None] + channel[None, :])
    return tl.load(
        pointers[:, None] + channel[None, :], mask=(channel < head_dim)[None, :], other=0.0
    )


@triton.jit
def beyond(own_y, own_x, y, x, reach2):
    """Whether [N] places are at least a reach from [M] places, bool [M, N]; squares in 32 bits.

    Of (own - place)^2 what belongs to the place alone goes to the other side: two multiply-adds
    and one comparison are left for each pair. own_y, own_x: small numbers, for that reason.
    """
    room = reach2 - y * y - x * x
    own2 = own_y * own_y + own_x * own_x
    crossed = own2[:, None] - (2 * own_y)[:, None] * y[None, :] - (2 * own_x)[:, None] * x[None, :]
    return crossed >= room[None, :]


@triton.jit
def sees(own_y, own_x, origin_y, origin_x, comparisons, total, keys):
    """Which of [N] keys the queries see, bool [M, N].

    own_y, own_x, origin_y, origin_x: doubled; of queries, counted from the tile's origin, and of
    the latter. comparisons: (6, total), see `key_comparisons`.
    """
    inner = beyond(
        own_y, own_x, tl.load(comparisons + keys) - origin_y,
        tl.load(comparisons + total + keys) - origin_x, tl.load(comparisons + 2 * total + keys),
    )  # fmt: skip
    outer = beyond(
        own_y, own_x, tl.load(comparisons + 3 * total + keys) - origin_y,
        tl.load(comparisons + 4 * total + keys) - origin_x, tl.load(comparisons + 5 * total + keys),
    )  # fmt: skip
    return inner & (outer == 0)


@triton.jit
def load_step(
    image_key, image_value, pooled_key, pooled_value, bias,
    key_stride, value_stride, pooled_stride, bias_stride,
    keys, step, end, token_keys, total, comparisons, own_y, own_x, origin_y, origin_x, head_dim,
    N: tl.constexpr, D: tl.constexpr, EVEN_D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The keys step..step + N of the lists in `keys`: keys, values, mask [M or 1, N] and bias.

    Pointers: to the head's first image token, pooled key and bias. Where not MASKED, all are there
    and all queries see them.
    """
    lane = tl.arange(0, N)
    listed = step + lane < end
    if MASKED:  # key 0 fills up
        key = tl.load(keys + step + lane, mask=listed, other=0)
        mask = sees(own_y, own_x, origin_y, origin_x, comparisons, total, key)
        mask = mask & listed[None, :]
    else:
        key = tl.load(keys + step + lane)
        mask = listed[None, :]
    k = load_listed(
        image_key, pooled_key, key_stride, pooled_stride, key, token_keys, head_dim, D, EVEN_D
    )
    v = load_listed(
        image_value, pooled_value, value_stride, pooled_stride, key, token_keys, head_dim, D, EVEN_D
    )
    return k, v, mask, load_bias(bias, bias_stride, key - token_keys, key >= token_keys, True)


@triton.jit
def attend_listed(
    query, row_max, row_sum, acc, image_key, image_value, pooled_key, pooled_value, bias,
    key_stride, value_stride, pooled_stride, bias_stride,
    keys, begin, end, token_keys, total, comparisons, own_y, own_x, origin_y, origin_x,
    scale_log2, head_dim,
    N: tl.constexpr, D: tl.constexpr, EVEN_D: tl.constexpr, MASKED: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Attention over the keys begin..end of the lists; see `load_step`."""
    for step in tl.range(begin, end, N, num_stages=STAGES):
        k, v, mask, b = load_step(
            image_key, image_value, pooled_key, pooled_value, bias,
            key_stride, value_stride, pooled_stride, bias_stride,
            keys, step, end, token_keys, total, comparisons, own_y, own_x, origin_y, origin_x,
            head_dim, N, D, EVEN_D, MASKED,
        )  # fmt: skip
        row_max, row_sum, acc = attend_block(
            query, k, v, mask, b, row_max, row_sum, acc, scale_log2, MASKED, True
        )
    return row_max, row_sum, acc


@triton.jit
def far_forward(
    query, key, value, image_key, image_value, pooled_key, pooled_value, bias, out, lse,
    keys, ranges, comparisons,
    query_batch, query_token, query_head, key_batch, key_token, key_head,
    value_batch, value_token, value_head, bias_token, bias_head,
    heads, head_dim, width, text_length, token_keys, total,
    query_start, query_stop, text_queries, tiles_x, tiles, scale_log2,
    R: tl.constexpr, C: tl.constexpr, N: tl.constexpr, STEP: tl.constexpr,
    D: tl.constexpr, EVEN_D: tl.constexpr, EVEN_TEXT: tl.constexpr, NEGATIVE: tl.constexpr,
    GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of all image queries; one program per tile, head and batch item.

    query: (batch, text_queries + image rows query_start to query_stop, heads, head_dim), key and
    value: (batch, text_length + token_keys, heads / GROUP, head_dim), with strides query_batch,
    query_token, query_head and so on; image_key, image_value: the same from the first image token
    on; bias: (total - token_keys, heads); pooled_key, pooled_value of as many and of the keys'
    heads, out, lse: contiguous; the lists: see cell_lists.py. NEGATIVE: the scale is that of the
    negated queries.
    """
    M: tl.constexpr = R * C
    tile, plane = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    batch, head = (plane // heads).to(tl.int64), (plane % heads).to(tl.int64)
    key_heads, own_key_head = heads // GROUP, head // GROUP
    tile_y, tile_x, own_y, own_x, valid = own_tile(
        tile, tiles_x, query_start, query_stop, width, R, C
    )
    tokens = text_queries + (own_y - query_start) * width + own_x
    query += batch * query_batch + head * query_head
    key += batch * key_batch + own_key_head * key_head
    value += batch * value_batch + own_key_head * value_head
    pooled = (batch * (total - token_keys) * key_heads + own_key_head) * head_dim
    q = load_rows(query, query_token, tokens, tl.full([M], True, tl.int1), head_dim, D, EVEN_D)
    if NEGATIVE:
        q = -q

    row_max = tl.full([M], LOWEST, tl.float32)
    row_sum = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    row_max, row_sum, acc = attend_run(
        q, row_max, row_sum, acc, key, value, key_token, value_token, batch, own_key_head,
        0, text_length, scale_log2, head_dim, None, 0,
        N, D, EVEN_D, EVEN_TEXT, False, False, STAGES,
    )  # fmt: skip
    image_key += batch * key_batch + own_key_head * key_head
    image_value += batch * value_batch + own_key_head * value_head
    begin, border, end = (
        tl.load(ranges + 3 * tile), tl.load(ranges + 3 * tile + 1), tl.load(ranges + 3 * tile + 2)
    )  # fmt: skip
    own_y, own_x = 2 * (own_y - tile_y), 2 * (own_x - tile_x)
    row_max, row_sum, acc = attend_listed(
        q, row_max, row_sum, acc, image_key, image_value, pooled_key + pooled,
        pooled_value + pooled, bias + head * bias_head,
        key_token, value_token, key_heads * head_dim, bias_token,
        keys, begin, border, token_keys, total, comparisons, own_y, own_x, 2 * tile_y, 2 * tile_x,
        scale_log2, head_dim, STEP, D, EVEN_D, False, STAGES,
    )  # fmt: skip
    row_max, row_sum, acc = attend_listed(
        q, row_max, row_sum, acc, image_key, image_value, pooled_key + pooled,
        pooled_value + pooled, bias + head * bias_head,
        key_token, value_token, key_heads * head_dim, bias_token,
        keys, border, end, token_keys, total, comparisons, own_y, own_x, 2 * tile_y, 2 * tile_x,
        scale_log2, head_dim, STEP, D, EVEN_D, True, STAGES,
    )  # fmt: skip
    row = batch * (text_queries + (query_stop - query_start) * width) * heads + head
    store_softmax(
        out + row * head_dim, lse + row, tokens, valid, row_max, row_sum, acc, heads, head_dim,
        D, EVEN_D,
    )  # fmt: skip
