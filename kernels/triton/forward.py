"""CLEAR attention of image queries: two-dimensional tiles, straight out of raster order.

A program owns one tile of queries of one head, whose keys all GROUP heads of its group read. It
attends to the text keys, to the pooled keys, then to the key tiles of its list (geometry.py):
without a mask where all is inside the disc, with one comparison per pair elsewhere. Nothing is
permuted and no mask is stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import (
    LOWEST,
    disc_mask,
    load_bias,
    load_rows,
    online_softmax,
    store_softmax,
    tile_columns,
    tile_rows,
)


@triton.jit
def attend_block(
    query, key, value, mask, bias, row_max, row_sum, acc, scale_log2,
    MASKED: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Softmax attention of [M, D] queries over one more block of [N, D] keys.

    bias: [N], in units of log2, added to the scores; mask: [M, N] or [1, N]; scale_log2: above 0.
    """
    scores = tl.dot(query, tl.trans(key), input_precision="ieee")
    if BIAS:
        scores = scores * scale_log2 + bias[None, :]
        scale_log2 = 1.0
    if MASKED:
        scores = tl.where(mask, scores, float("-inf"))
    probability, factor, row_max, row_sum = online_softmax(scores, row_max, row_sum, scale_log2)
    acc = acc * factor[:, None]
    acc = tl.dot(probability.to(value.dtype), value, acc, input_precision="ieee")
    return row_max, row_sum, acc


@triton.jit
def load_run(
    sequence, stride, batch, head, start, valid, head_dim,
    N: tl.constexpr, D: tl.constexpr, EVEN_D: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """The tokens start..start + N of one head, [N, D].

    sequence: a tensor descriptor of (batch, tokens, heads, head_dim), which reads others too where
    not `valid`, or a pointer to token 0 of the head.
    """
    if DESCRIPTOR:
        return tl.reshape(sequence.load([batch, start, head, 0]), [N, D])
    else:
        return load_rows(sequence, stride, start + tl.arange(0, N), valid, head_dim, D, EVEN_D)


@triton.jit
def attend_run(
    query, row_max, row_sum, acc, key, value, key_stride, value_stride, batch, head, begin, end,
    scale_log2, head_dim, bias, bias_stride,
    N: tl.constexpr, D: tl.constexpr, EVEN_D: tl.constexpr, EVEN: tl.constexpr,
    BIAS: tl.constexpr, DESCRIPTOR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attention over the tokens begin..end of one head, all visible. EVEN: (end - begin) % N == 0.

    key, value: see `load_run`; bias, where BIAS: a pointer to that of token 0 of the head.
    """
    lane = tl.arange(0, N)
    full = begin + (end - begin) // N * N
    everything = tl.full([N], True, tl.int1)
    for start in tl.range(begin, full, N, num_stages=STAGES):
        k = load_run(
            key, key_stride, batch, head, start, everything, head_dim, N, D, EVEN_D, DESCRIPTOR
        )
        v = load_run(
            value, value_stride, batch, head, start, everything, head_dim, N, D, EVEN_D, DESCRIPTOR
        )
        b = load_bias(bias, bias_stride, start + lane, everything, BIAS)
        row_max, row_sum, acc = attend_block(
            query, k, v, everything, b, row_max, row_sum, acc, scale_log2, False, BIAS
        )
    if not EVEN:
        for start in tl.range(full, end, N, num_stages=1):
            valid = start + lane < end
            k = load_run(
                key, key_stride, batch, head, start, valid, head_dim, N, D, EVEN_D, DESCRIPTOR
            )
            v = load_run(
                value, value_stride, batch, head, start, valid, head_dim, N, D, EVEN_D, DESCRIPTOR
            )
            b = load_bias(bias, bias_stride, start + lane, valid, BIAS)
            row_max, row_sum, acc = attend_block(
                query, k, v, valid[None, :], b, row_max, row_sum, acc, scale_log2, True, BIAS
            )
    return row_max, row_sum, acc


@triton.jit
def load_tile(
    image, stride, batch, head, y, x, height, width, head_dim,
    R: tl.constexpr, C: tl.constexpr, D: tl.constexpr, EVEN_D: tl.constexpr,
    CLIP: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """Image tokens of the R x C tile at (y, x), [R * C, D]; zero beyond the border.

    image: a tensor descriptor of (batch, rows, columns, heads, head_dim), or a pointer to the first
    image token of the head. Without CLIP the tile is known to lie inside.
    """
    if DESCRIPTOR:
        return tl.reshape(image.load([batch, y, x, head, 0]), [R * C, D])
    else:
        rows, columns = y + tile_rows(R, C), x + tile_columns(R, C)
        valid = tl.full([R * C], True, tl.int1)
        if CLIP:
            valid = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
        return load_rows(image, stride, rows * width + columns, valid, head_dim, D, EVEN_D)


@triton.jit
def attend_tiles(
    query, row_max, row_sum, acc, image_key, image_value, key_stride, value_stride,
    offsets, begin, end, batch, head, tile_y, tile_x, own_y, own_x, height, width, radius,
    scale_log2, head_dim,
    M: tl.constexpr, R: tl.constexpr, C: tl.constexpr, D: tl.constexpr, EVEN_D: tl.constexpr,
    MASKED: tl.constexpr, DESCRIPTOR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attention over the key tiles begin..end of the lists in `offsets`."""
    for step in tl.range(begin, end, num_stages=STAGES):
        y = tile_y + tl.load(offsets + 2 * step).to(tl.int32)
        x = tile_x + tl.load(offsets + 2 * step + 1).to(tl.int32)
        k = load_tile(
            image_key, key_stride, batch, head, y, x, height, width, head_dim,
            R, C, D, EVEN_D, MASKED, DESCRIPTOR,
        )  # fmt: skip
        v = load_tile(
            image_value, value_stride, batch, head, y, x, height, width, head_dim,
            R, C, D, EVEN_D, MASKED, DESCRIPTOR,
        )  # fmt: skip
        mask = disc_mask(own_y, own_x, y, x, height, width, radius, M, R, C)
        row_max, row_sum, acc = attend_block(
            query, k, v, mask, None, row_max, row_sum, acc, scale_log2, MASKED, False
        )
    return row_max, row_sum, acc


@triton.jit
def image_forward(
    query, key, value, pooled_key, pooled_value, bias, image_key, image_value, out, lse,
    offsets, ranges, row_class, column_class,
    query_batch, query_token, query_head, key_batch, key_token, key_head,
    value_batch, value_token, value_head, bias_token, bias_head,
    heads, head_dim, height, width, text_length, pooled_length,
    query_start, query_stop, text_queries, tiles_x, tiles, column_classes, radius, scale_log2,
    R: tl.constexpr, C: tl.constexpr, STEP_R: tl.constexpr, STEP_C: tl.constexpr,
    N: tl.constexpr, D: tl.constexpr, EVEN_D: tl.constexpr, EVEN_TEXT: tl.constexpr,
    POOLED: tl.constexpr, BIAS: tl.constexpr, NEGATIVE: tl.constexpr, DESCRIPTOR: tl.constexpr,
    GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of all image queries; one program per tile, head and batch item.

    query: (batch, text_queries + image rows query_start to query_stop, heads, head_dim), key and
    value: (batch, text + image, heads / GROUP, head_dim), with strides query_batch, query_token,
    query_head and so on; pooled_key, pooled_value of as many heads, out, lse: contiguous; bias,
    where BIAS: (pooled, heads). image_key, image_value: the image's part of key and value. Keys and
    values are tensor descriptors where DESCRIPTOR, else pointers to the first token. Rows are
    counted from the first that is given. NEGATIVE: the scale is that of the negated queries.
    """
    M: tl.constexpr = R * C
    tile, plane = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    batch, head = plane // heads, plane % heads
    key_heads, own_key_head = heads // GROUP, head // GROUP
    tile_y, tile_x = query_start + tile // tiles_x * R, tile % tiles_x * C
    own_y, own_x = tile_y + tile_rows(R, C), tile_x + tile_columns(R, C)
    valid = (own_y < query_stop) & (own_x < width)
    # Beyond the border a token of the border stands in; it is not stored.
    own_y, own_x = tl.minimum(own_y, query_stop - 1), tl.minimum(own_x, width - 1)
    tokens = text_queries + (own_y - query_start) * width + own_x
    everything = tl.full([M], True, tl.int1)

    wide_batch, wide_head = batch.to(tl.int64), head.to(tl.int64)
    query += wide_batch * query_batch + wide_head * query_head
    if not DESCRIPTOR:
        wide_key_head = own_key_head.to(tl.int64)
        key += wide_batch * key_batch + wide_key_head * key_head
        value += wide_batch * value_batch + wide_key_head * value_head
        image_key += wide_batch * key_batch + wide_key_head * key_head
        image_value += wide_batch * value_batch + wide_key_head * value_head
    # Long before they are needed: what is loaded by them waits for them.
    row_of_ranges = tl.load(row_class + tile // tiles_x) * column_classes
    entry = ranges + 3 * (row_of_ranges + tl.load(column_class + tile % tiles_x))
    begin, border, end = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    q = load_rows(query, query_token, tokens, everything, head_dim, D, EVEN_D)
    if NEGATIVE:
        q = -q

    row_max = tl.full([M], LOWEST, tl.float32)
    row_sum = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    row_max, row_sum, acc = attend_run(
        q, row_max, row_sum, acc, key, value, key_token, value_token, batch, own_key_head,
        0, text_length, scale_log2, head_dim, None, 0,
        N, D, EVEN_D, EVEN_TEXT, False, DESCRIPTOR, STAGES,
    )  # fmt: skip
    if POOLED:
        if not DESCRIPTOR:
            plane_start = (wide_batch * pooled_length * key_heads + own_key_head) * head_dim
            pooled_key += plane_start
            pooled_value += plane_start
        row_max, row_sum, acc = attend_run(
            q, row_max, row_sum, acc, pooled_key, pooled_value,
            key_heads * head_dim, key_heads * head_dim, batch, own_key_head, 0, pooled_length,
            scale_log2, head_dim, bias + wide_head * bias_head, bias_token,
            N, D, EVEN_D, False, BIAS, DESCRIPTOR, STAGES,
        )  # fmt: skip

    row_max, row_sum, acc = attend_tiles(
        q, row_max, row_sum, acc, image_key, image_value, key_token, value_token,
        offsets, begin, border, batch, own_key_head, tile_y, tile_x, own_y, own_x,
        height, width, radius, scale_log2, head_dim,
        M, STEP_R, STEP_C, D, EVEN_D, False, DESCRIPTOR, STAGES,
    )  # fmt: skip
    row_max, row_sum, acc = attend_tiles(
        q, row_max, row_sum, acc, image_key, image_value, key_token, value_token,
        offsets, border, end, batch, own_key_head, tile_y, tile_x, own_y, own_x,
        height, width, radius, scale_log2, head_dim,
        M, STEP_R, STEP_C, D, EVEN_D, True, DESCRIPTOR, STAGES,
    )  # fmt: skip

    queries = text_queries + (query_stop - query_start) * width
    row = wide_batch * queries * heads + head
    store_softmax(
        out + row * head_dim, lse + row, tokens, valid, row_max, row_sum, acc, heads, head_dim,
        D, EVEN_D,
    )  # fmt: skip
