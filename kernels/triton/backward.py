"""Gradients of CLEAR attention, from the log-sum-exp of the forward pass (arXiv 2205.14135, B.4).

With p = exp(score - lse), of all keys a query sees, and delta = sum(grad * out):
grad score = p * (grad probability - delta). Gradients of subsets of keys or queries add up, so the
text, the pooled keys and the disc are walked one after the other, by whom they are owed to:

- an image query: text keys, pooled keys, key tiles of its tile's list;
- an image key: text queries, then query tiles of the same list read with the roles exchanged;
- a text query: all tokens; a text key: all tokens; a pooled key: all image tokens. These are few
  owners with long walks: a walk is split over programs and the parts are added, in a fixed order.

Of a group of GROUP heads that read the same keys, a key's program walks one after the other.

No atomics: the result does not change from run to run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..groups import group_of
from ..opaque import Geometry, Gradients
from .forward import load_tile
from .geometry import visits
from .launch import OPTIONS, channels, readable_by_descriptor
from .primitives import LOG2_E, disc_mask, load_bias, load_rows, store_rows, tile_columns, tile_rows
from .tables import BackwardConfig, RunConfig, TileConfig

# Of one walk: bounds the memory of the parts.
MOST_SPLITS = 32
# Rows of a program of `prepare_rows`.
PREPARE_ROWS = 32


@triton.jit
def prepare_rows(
    grad, out, lse, lse_log2, delta,
    grad_batch, grad_token, grad_head, out_batch, out_token, out_head,
    heads, head_dim, sequence, blocks,
    M: tl.constexpr, D: tl.constexpr, EVEN_D: tl.constexpr,
):  # fmt: skip
    """delta, and lse in units of log2, as the walks read them: float32 (batch, heads, sequence).

    A row is a token's head, heads next to each other as they are in memory.
    """
    block, batch = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    row = block * M + tl.arange(0, M)
    valid = row < sequence * heads
    token, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    grad += batch * grad_batch
    out += batch * out_batch
    g = load_rows(grad, 1, token * grad_token + head * grad_head, valid, head_dim, D, EVEN_D)
    o = load_rows(out, 1, token * out_token + head * out_head, valid, head_dim, D, EVEN_D)
    target = (batch * heads + head) * sequence + token
    tl.store(delta + target, tl.sum(g.to(tl.float32) * o.to(tl.float32), 1), mask=valid)
    natural = tl.load(lse + batch * sequence * heads + row, mask=valid, other=0.0)
    tl.store(lse_log2 + target, natural * LOG2_E, mask=valid)


@triton.jit
def add_query_gradient(
    query_sum, query, grad, lse, delta, key, value, mask, bias, scale_log2,
    MASKED: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Gradient [M, D] of queries, but for the scale, from [N, D] more keys.

    query, grad: [M, D]; lse (log2), delta: [M]; mask: [M, N] or [1, N]; bias (log2): [N].
    """
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
    if BIAS:
        scores += bias[None, :]
    probability = tl.exp2(scores - lse[:, None])
    if MASKED:
        probability = tl.where(mask, probability, 0.0)
    grad_probability = tl.dot(grad, tl.trans(value), input_precision="ieee")
    grad_scores = probability * (grad_probability - delta[:, None])
    return tl.dot(grad_scores.to(key.dtype), key, query_sum, input_precision="ieee")


@triton.jit
def add_key_gradients(
    key_sum, value_sum, bias_sum, key, value, bias, query, grad, lse, delta, mask, scale_log2,
    MASKED: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Gradients [M, D] of keys, but for the scale, and of values, from [N, D] more queries.

    key, value: [M, D]; query, grad: [N, D]; lse (log2), delta: [N]; mask: [M, N]. With BIAS also
    the gradient [M] of what is added to the keys' scores, `bias` in log2. The scores are
    transposed, so that they are a dot's left operand as they stand in registers.
    """
    scores = tl.dot(key, tl.trans(query), input_precision="ieee") * scale_log2
    if BIAS:
        scores += bias[:, None]
    probability = tl.exp2(scores - lse[None, :])
    if MASKED:
        probability = tl.where(mask, probability, 0.0)
    value_sum = tl.dot(probability.to(grad.dtype), grad, value_sum, input_precision="ieee")
    grad_probability = tl.dot(value, tl.trans(grad), input_precision="ieee")
    grad_scores = probability * (grad_probability - delta[None, :])
    if BIAS:
        bias_sum += tl.sum(grad_scores, 1)
    key_sum = tl.dot(grad_scores.to(query.dtype), query, key_sum, input_precision="ieee")
    return key_sum, value_sum, bias_sum


@triton.jit
def walk_keys(
    query_sum, query, grad, lse, delta, key, value, key_token, value_token, begin, end,
    scale_log2, head_dim, bias, bias_token,
    N: tl.constexpr, D: tl.constexpr, EVEN_D: tl.constexpr, BIAS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """`add_query_gradient` over the tokens begin..end of one head, all visible."""
    lane = tl.arange(0, N)
    full = begin + (end - begin) // N * N
    everything = tl.full([N], True, tl.int1)
    for start in tl.range(begin, full, N, num_stages=STAGES):
        k = load_rows(key, key_token, start + lane, everything, head_dim, D, EVEN_D)
        v = load_rows(value, value_token, start + lane, everything, head_dim, D, EVEN_D)
        b = load_bias(bias, bias_token, start + lane, everything, BIAS)
        query_sum = add_query_gradient(
            query_sum, query, grad, lse, delta, k, v, everything[None, :], b, scale_log2,
            False, BIAS,
        )  # fmt: skip
    for start in tl.range(full, end, N, num_stages=1):
        valid = start + lane < end
        k = load_rows(key, key_token, start + lane, valid, head_dim, D, EVEN_D)
        v = load_rows(value, value_token, start + lane, valid, head_dim, D, EVEN_D)
        b = load_bias(bias, bias_token, start + lane, valid, BIAS)
        query_sum = add_query_gradient(
            query_sum, query, grad, lse, delta, k, v, valid[None, :], b, scale_log2, True, BIAS
        )
    return query_sum


@triton.jit
def walk_queries(
    key_sum, value_sum, bias_sum, key, value, bias, query, grad, lse, delta, query_token,
    grad_token, begin, end, scale_log2, head_dim,
    N: tl.constexpr, D: tl.constexpr, EVEN_D: tl.constexpr, BIAS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """`add_key_gradients` over the tokens begin..end of one head, all of which see the keys."""
    lane = tl.arange(0, N)
    for start in tl.range(begin, end, N, num_stages=STAGES):
        valid = start + lane < end
        q = load_rows(query, query_token, start + lane, valid, head_dim, D, EVEN_D)
        g = load_rows(grad, grad_token, start + lane, valid, head_dim, D, EVEN_D)
        # Queries beyond the end add nothing: all that is theirs is 0, their probability 1.
        row_lse = tl.load(lse + start + lane, mask=valid, other=0.0)
        row_delta = tl.load(delta + start + lane, mask=valid, other=0.0)
        key_sum, value_sum, bias_sum = add_key_gradients(
            key_sum, value_sum, bias_sum, key, value, bias, q, g, row_lse, row_delta, None,
            scale_log2, False, BIAS,
        )  # fmt: skip
    return key_sum, value_sum, bias_sum


@triton.jit
def locate_tile(y, x, height, width, R: tl.constexpr, C: tl.constexpr, CLIP: tl.constexpr):
    """Tokens of the R x C tile at (y, x), counted from the image's first, and which ones exist.

    Without CLIP the tile is known to lie inside.
    """
    rows, columns = y + tile_rows(R, C), x + tile_columns(R, C)
    valid = tl.full([R * C], True, tl.int1)
    if CLIP:
        valid = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    return rows * width + columns, valid


@triton.jit
def walk_key_tiles(
    query_sum, query, grad, lse, delta, key, value, key_token, value_token,
    offsets, begin, end, batch, head, tile_y, tile_x, own_y, own_x, height, width, radius,
    scale_log2, head_dim,
    M: tl.constexpr, R: tl.constexpr, C: tl.constexpr, D: tl.constexpr, EVEN_D: tl.constexpr,
    MASKED: tl.constexpr, DESCRIPTOR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`add_query_gradient` over key tiles; key, value: pointers to the head's first image token."""
    for step in tl.range(begin, end, num_stages=STAGES):
        y = tile_y + tl.load(offsets + 2 * step).to(tl.int32)
        x = tile_x + tl.load(offsets + 2 * step + 1).to(tl.int32)
        k = load_tile(
            key, key_token, batch, head, y, x, height, width, head_dim,
            R, C, D, EVEN_D, MASKED, DESCRIPTOR,
        )  # fmt: skip
        v = load_tile(
            value, value_token, batch, head, y, x, height, width, head_dim,
            R, C, D, EVEN_D, MASKED, DESCRIPTOR,
        )  # fmt: skip
        mask = disc_mask(own_y, own_x, y, x, height, width, radius, M, R, C)
        query_sum = add_query_gradient(
            query_sum, query, grad, lse, delta, k, v, mask, None, scale_log2, MASKED, False
        )
    return query_sum


@triton.jit
def walk_query_tiles(
    key_sum, value_sum, key, value, query, grad, lse, delta, query_token, grad_token,
    offsets, begin, end, batch, head, tile_y, tile_x, own_y, own_x, height, width, radius,
    scale_log2, head_dim,
    M: tl.constexpr, R: tl.constexpr, C: tl.constexpr, D: tl.constexpr, EVEN_D: tl.constexpr,
    MASKED: tl.constexpr, DESCRIPTOR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`add_key_gradients` over query tiles; query, grad, lse, delta: at the first image token."""
    for step in tl.range(begin, end, num_stages=STAGES):
        y = tile_y + tl.load(offsets + 2 * step).to(tl.int32)
        x = tile_x + tl.load(offsets + 2 * step + 1).to(tl.int32)
        q = load_tile(
            query, query_token, batch, head, y, x, height, width, head_dim,
            R, C, D, EVEN_D, MASKED, DESCRIPTOR,
        )  # fmt: skip
        g = load_tile(
            grad, grad_token, batch, head, y, x, height, width, head_dim,
            R, C, D, EVEN_D, MASKED, DESCRIPTOR,
        )  # fmt: skip
        tokens, valid = locate_tile(y, x, height, width, R, C, MASKED)
        row_lse = tl.load(lse + tokens, mask=valid, other=0.0)
        row_delta = tl.load(delta + tokens, mask=valid, other=0.0)
        # Queries beyond the border add nothing, as in `walk_queries`.
        mask = disc_mask(own_y, own_x, y, x, height, width, radius, M, R, C, CLIP=False)
        key_sum, value_sum, _ = add_key_gradients(
            key_sum, value_sum, 0.0, key, value, None, q, g, row_lse, row_delta, mask,
            scale_log2, MASKED, False,
        )  # fmt: skip
    return key_sum, value_sum


@triton.jit
def image_query_backward(
    grad, query, key, value, pooled_key, pooled_value, bias, image_key, image_value, lse, delta,
    grad_query, offsets, ranges, row_class, column_class,
    grad_batch, grad_token, grad_head, query_batch, query_token, query_head,
    key_batch, key_token, key_head, value_batch, value_token, value_head,
    heads, head_dim, height, width, text_length, pooled_length, bias_token, bias_head,
    tiles_x, tiles, column_classes, radius, scale, scale_log2,
    R: tl.constexpr, C: tl.constexpr, STEP_R: tl.constexpr, STEP_C: tl.constexpr,
    D: tl.constexpr, EVEN_D: tl.constexpr, DESCRIPTOR: tl.constexpr, GROUP: tl.constexpr,
    STAGES: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Gradient of the image queries; one program per query tile, head and batch item.

    grad, query: (batch, text + image, heads, head_dim), and key, value of heads / GROUP heads, with
    strides grad_batch, grad_token, grad_head and so on; pooled_key, pooled_value of as many heads,
    grad_query: contiguous; bias, where BIAS: (pooled, heads); lse, delta: as `prepare_rows` writes
    them; the lists: see geometry.py.
    """
    M: tl.constexpr = R * C
    N: tl.constexpr = STEP_R * STEP_C
    tile, plane = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    item, place = plane // heads, plane % heads
    batch, head = item.to(tl.int64), place.to(tl.int64)
    key_heads, own_key_head = heads // GROUP, head // GROUP
    tile_y, tile_x = tile // tiles_x * R, tile % tiles_x * C
    own_y, own_x = tile_y + tile_rows(R, C), tile_x + tile_columns(R, C)
    tokens, valid = locate_tile(tile_y, tile_x, height, width, R, C, True)
    tokens += text_length
    sequence = text_length + height * width

    grad += batch * grad_batch + head * grad_head
    query += batch * query_batch + head * query_head
    key += batch * key_batch + own_key_head * key_head
    value += batch * value_batch + own_key_head * value_head
    g = load_rows(grad, grad_token, tokens, valid, head_dim, D, EVEN_D)
    q = load_rows(query, query_token, tokens, valid, head_dim, D, EVEN_D)
    row = plane.to(tl.int64) * sequence
    row_lse = tl.load(lse + row + tokens, mask=valid, other=0.0)
    row_delta = tl.load(delta + row + tokens, mask=valid, other=0.0)

    query_sum = tl.zeros([M, D], tl.float32)
    query_sum = walk_keys(
        query_sum, q, g, row_lse, row_delta, key, value, key_token, value_token, 0, text_length,
        scale_log2, head_dim, None, 0, N, D, EVEN_D, False, STAGES,
    )  # fmt: skip
    pooled = (batch * pooled_length * key_heads + own_key_head) * head_dim
    query_sum = walk_keys(
        query_sum, q, g, row_lse, row_delta, pooled_key + pooled, pooled_value + pooled,
        key_heads * head_dim, key_heads * head_dim, 0, pooled_length, scale_log2, head_dim,
        bias + head * bias_head, bias_token, N, D, EVEN_D, BIAS, STAGES,
    )  # fmt: skip
    if not DESCRIPTOR:
        image_key += batch * key_batch + own_key_head * key_head
        image_value += batch * value_batch + own_key_head * value_head
    row_of_ranges = tl.load(row_class + tile // tiles_x) * column_classes
    entry = ranges + 3 * (row_of_ranges + tl.load(column_class + tile % tiles_x))
    begin, border, end = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    query_sum = walk_key_tiles(
        query_sum, q, g, row_lse, row_delta, image_key, image_value, key_token, value_token,
        offsets, begin, border, item, place // GROUP, tile_y, tile_x, own_y, own_x,
        height, width, radius, scale_log2, head_dim,
        M, STEP_R, STEP_C, D, EVEN_D, False, DESCRIPTOR, STAGES,
    )  # fmt: skip
    query_sum = walk_key_tiles(
        query_sum, q, g, row_lse, row_delta, image_key, image_value, key_token, value_token,
        offsets, border, end, item, place // GROUP, tile_y, tile_x, own_y, own_x,
        height, width, radius, scale_log2, head_dim,
        M, STEP_R, STEP_C, D, EVEN_D, True, DESCRIPTOR, STAGES,
    )  # fmt: skip
    grad_query += (batch * sequence * heads + head) * head_dim
    store_rows(grad_query, heads * head_dim, tokens, valid, query_sum * scale, head_dim, D, EVEN_D)


@triton.jit
def image_key_backward(
    grad, query, key, value, image_query, image_grad, lse, delta, grad_key, grad_value,
    offsets, ranges, row_class, column_class,
    grad_batch, grad_token, grad_head, query_batch, query_token, query_head,
    key_batch, key_token, key_head, value_batch, value_token, value_head,
    heads, head_dim, height, width, text_length,
    tiles_x, tiles, column_classes, radius, scale, scale_log2,
    R: tl.constexpr, C: tl.constexpr, STEP_R: tl.constexpr, STEP_C: tl.constexpr,
    D: tl.constexpr, EVEN_D: tl.constexpr, DESCRIPTOR: tl.constexpr, GROUP: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of the image keys and values; one program per key tile and head, and batch item.

    The disc is symmetric: the lists of `image_query_backward` are read with the roles exchanged.
    """
    M: tl.constexpr = R * C
    N: tl.constexpr = STEP_R * STEP_C
    tile, plane = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    key_heads = heads // GROUP
    item, place = plane // key_heads, plane % key_heads
    batch, own_key_head = item.to(tl.int64), place.to(tl.int64)
    tile_y, tile_x = tile // tiles_x * R, tile % tiles_x * C
    own_y, own_x = tile_y + tile_rows(R, C), tile_x + tile_columns(R, C)
    tokens, valid = locate_tile(tile_y, tile_x, height, width, R, C, True)
    tokens += text_length
    sequence = text_length + height * width

    key += batch * key_batch + own_key_head * key_head
    value += batch * value_batch + own_key_head * value_head
    k = load_rows(key, key_token, tokens, valid, head_dim, D, EVEN_D)
    v = load_rows(value, value_token, tokens, valid, head_dim, D, EVEN_D)

    key_sum = tl.zeros([M, D], tl.float32)
    value_sum = tl.zeros([M, D], tl.float32)
    for member in range(GROUP):
        head = own_key_head * GROUP + member
        row = (plane.to(tl.int64) * GROUP + member) * sequence
        key_sum, value_sum, _ = walk_queries(
            key_sum, value_sum, tl.zeros([M], tl.float32), k, v, None,
            query + batch * query_batch + head * query_head,
            grad + batch * grad_batch + head * grad_head, lse + row, delta + row,
            query_token, grad_token, 0, text_length, scale_log2, head_dim,
            N, D, EVEN_D, False, STAGES,
        )  # fmt: skip
        own_query, own_grad = image_query, image_grad
        if not DESCRIPTOR:
            own_query += batch * query_batch + head * query_head
            own_grad += batch * grad_batch + head * grad_head
        row_of_ranges = tl.load(row_class + tile // tiles_x) * column_classes
        entry = ranges + 3 * (row_of_ranges + tl.load(column_class + tile % tiles_x))
        begin, border, end = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
        key_sum, value_sum = walk_query_tiles(
            key_sum, value_sum, k, v, own_query, own_grad, lse + row + text_length,
            delta + row + text_length, query_token, grad_token, offsets, begin, border,
            item, place * GROUP + member, tile_y, tile_x, own_y, own_x, height, width, radius,
            scale_log2, head_dim, M, STEP_R, STEP_C, D, EVEN_D, False, DESCRIPTOR, STAGES,
        )  # fmt: skip
        key_sum, value_sum = walk_query_tiles(
            key_sum, value_sum, k, v, own_query, own_grad, lse + row + text_length,
            delta + row + text_length, query_token, grad_token, offsets, border, end,
            item, place * GROUP + member, tile_y, tile_x, own_y, own_x, height, width, radius,
            scale_log2, head_dim, M, STEP_R, STEP_C, D, EVEN_D, True, DESCRIPTOR, STAGES,
        )  # fmt: skip
    start = (batch * sequence * key_heads + own_key_head) * head_dim
    stride = key_heads * head_dim
    store_rows(grad_key + start, stride, tokens, valid, key_sum * scale, head_dim, D, EVEN_D)
    store_rows(grad_value + start, stride, tokens, valid, value_sum, head_dim, D, EVEN_D)


@triton.jit
def text_query_backward(
    grad, query, key, value, lse, delta, part,
    grad_batch, grad_token, grad_head, query_batch, query_token, query_head,
    key_batch, key_token, key_head, value_batch, value_token, value_head, part_split, part_batch,
    heads, head_dim, text_length, first_key, sequence, keys_per_split, blocks, planes,
    scale, scale_log2,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, EVEN_D: tl.constexpr,
    GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of text queries from one split of the keys from `first_key` on.

    part: (splits, batch, text, heads, head_dim); strides part_split and part_batch, else
    contiguous.
    """
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    plane, split = rest % planes, rest // planes
    batch, head = (plane // heads).to(tl.int64), (plane % heads).to(tl.int64)
    own_key_head = head // GROUP
    tokens = block * M + tl.arange(0, M)
    valid = tokens < text_length
    grad += batch * grad_batch + head * grad_head
    query += batch * query_batch + head * query_head
    key += batch * key_batch + own_key_head * key_head
    value += batch * value_batch + own_key_head * value_head
    g = load_rows(grad, grad_token, tokens, valid, head_dim, D, EVEN_D)
    q = load_rows(query, query_token, tokens, valid, head_dim, D, EVEN_D)
    row = plane.to(tl.int64) * sequence
    row_lse = tl.load(lse + row + tokens, mask=valid, other=0.0)
    row_delta = tl.load(delta + row + tokens, mask=valid, other=0.0)

    begin = first_key + split * keys_per_split
    end = tl.minimum(begin + keys_per_split, sequence)
    query_sum = walk_keys(
        tl.zeros([M, D], tl.float32), q, g, row_lse, row_delta, key, value, key_token, value_token,
        begin, end, scale_log2, head_dim, None, 0, N, D, EVEN_D, False, STAGES,
    )  # fmt: skip
    part += split.to(tl.int64) * part_split + batch * part_batch + head * head_dim
    store_rows(part, heads * head_dim, tokens, valid, query_sum * scale, head_dim, D, EVEN_D)


@triton.jit
def common_key_backward(
    grad, query, key, value, bias, lse, delta, key_part, value_part, bias_part,
    grad_batch, grad_token, grad_head, query_batch, query_token, query_head,
    key_batch, key_token, key_head, value_batch, value_token, value_head, part_split, part_batch,
    bias_token, bias_head,
    heads, head_dim, key_length, first_query, sequence, queries_per_split, blocks, planes,
    scale, scale_log2,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, EVEN_D: tl.constexpr,
    GROUP: tl.constexpr, STAGES: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys and values that every query from `first_query` on sees.

    key, value: (batch, key_length or more, heads / GROUP, head_dim), the text's or the pooled ones.
    key_part, value_part: (splits, batch, key_length, heads / GROUP, head_dim); strides part_split
    and part_batch, else contiguous. Where BIAS, bias: (key_length, heads), and its gradient,
    bias_part: float32 (splits, batch, key_length, heads), contiguous. planes: of key heads.
    """
    key_heads = heads // GROUP
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    plane, split = rest % planes, rest // planes
    batch, own_key_head = (plane // key_heads).to(tl.int64), (plane % key_heads).to(tl.int64)
    tokens = block * M + tl.arange(0, M)
    valid = tokens < key_length
    key += batch * key_batch + own_key_head * key_head
    value += batch * value_batch + own_key_head * value_head
    k = load_rows(key, key_token, tokens, valid, head_dim, D, EVEN_D)
    v = load_rows(value, value_token, tokens, valid, head_dim, D, EVEN_D)

    begin = first_query + split * queries_per_split
    end = tl.minimum(begin + queries_per_split, sequence)
    key_sum = tl.zeros([M, D], tl.float32)
    value_sum = tl.zeros([M, D], tl.float32)
    for member in range(GROUP):
        head = own_key_head * GROUP + member
        row = (plane.to(tl.int64) * GROUP + member) * sequence
        key_sum, value_sum, bias_sum = walk_queries(
            key_sum, value_sum, tl.zeros([M], tl.float32), k, v,
            load_bias(bias + head * bias_head, bias_token, tokens, valid, BIAS),
            query + batch * query_batch + head * query_head,
            grad + batch * grad_batch + head * grad_head, lse + row, delta + row,
            query_token, grad_token, begin, end, scale_log2, head_dim,
            N, D, EVEN_D, BIAS, STAGES,
        )  # fmt: skip
        if BIAS:
            row = (split.to(tl.int64) * (planes // key_heads) + batch) * key_length * heads + head
            tl.store(bias_part + row + tokens.to(tl.int64) * heads, bias_sum, mask=valid)
    start = split.to(tl.int64) * part_split + batch * part_batch + own_key_head * head_dim
    stride = key_heads * head_dim
    store_rows(key_part + start, stride, tokens, valid, key_sum * scale, head_dim, D, EVEN_D)
    store_rows(value_part + start, stride, tokens, valid, value_sum, head_dim, D, EVEN_D)


def split_walk(length: int, step: int, owners: int, programs: int) -> tuple[int, int]:
    """Into how many splits of how many tokens a walk goes, so that there are `programs`.

    The size is a multiple of `step` and no split is empty.
    """
    wanted = min(MOST_SPLITS, triton.cdiv(programs, owners))
    size = triton.cdiv(triton.cdiv(length, wanted), step) * step
    return triton.cdiv(length, size), size


def parts_of(target: torch.Tensor, splits: int) -> torch.Tensor:
    """Where splits write their sums: the target itself if there is only one."""
    if splits == 1:
        return target.unsqueeze(0)
    return torch.empty(splits, *target.shape, dtype=torch.float32, device=target.device)


def strides_of(*tensors: torch.Tensor) -> tuple[int, ...]:
    """Batch, token and head strides."""
    return tuple(stride for tensor in tensors for stride in tensor.stride()[:3])


@dataclass(frozen=True)
class Walked:
    """What the launches of one backward pass share; lse and delta as `prepare_rows` writes them."""

    grad: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    lse: torch.Tensor
    delta: torch.Tensor
    geometry: Geometry

    @property
    def heads(self) -> tuple[int, int]:
        """Their number, and their channels."""
        return self.query.shape[2], self.query.shape[3]

    @property
    def group(self) -> int:
        """Heads that read the same key head."""
        return group_of(self.query, self.key)

    @property
    def planes(self) -> int:
        """Heads of all batch items."""
        return self.query.shape[0] * self.query.shape[2]

    @property
    def key_planes(self) -> int:
        """Key heads of all batch items."""
        return self.key.shape[0] * self.key.shape[2]

    @property
    def scales(self) -> tuple[float, float]:
        return self.geometry.scale, self.geometry.scale * math.log2(math.e)


def _walk_image(
    kernel: Any,
    config: TileConfig,
    walked: Walked,
    planes: int,
    more: Sequence[torch.Tensor],
    visited: tuple[torch.Tensor, torch.Tensor],
    targets: Sequence[torch.Tensor],
    more_numbers: Sequence[int],
    **flags: bool,
) -> None:
    """Launch a kernel whose programs own tiles; `visited` are the two tensors its lists lead to.

    planes: of the owners, which are queries or keys.
    more, more_numbers, flags: of this kernel only.
    """
    height, width, text_length, radius, *_ = walked.geometry
    tiling, size = config.tiling, channels(walked.heads[1])
    lists = visits(height, width, radius, tiling, walked.query.device)
    tiles_x = lists.column_class.numel()
    tiles = lists.row_class.numel() * tiles_x
    images: list[Any] = [tokens[:, text_length:] for tokens in visited]
    descriptor = config.descriptor and all(map(readable_by_descriptor, images))
    if descriptor:
        block = [1, tiling.step_rows, tiling.step_columns, 1, size["D"]]
        images = [
            TensorDescriptor.from_tensor(image.unflatten(1, (height, width)), block)
            for image in images
        ]
    four = (walked.grad, walked.query, walked.key, walked.value)
    kernel[(tiles * planes,)](
        *four, *more, *images, walked.lse, walked.delta, *targets,
        lists.offsets, lists.ranges, lists.row_class, lists.column_class, *strides_of(*four),
        *walked.heads, height, width, text_length, *more_numbers,
        tiles_x, tiles, lists.ranges.shape[1], radius, *walked.scales,
        R=tiling.rows, C=tiling.columns, STEP_R=tiling.step_rows, STEP_C=tiling.step_columns,
        **size, DESCRIPTOR=descriptor, GROUP=walked.group, STAGES=config.num_stages, **flags,
        num_warps=config.num_warps, num_stages=config.num_stages, **OPTIONS,
    )  # fmt: skip


def _walk_runs(
    kernel: Any,
    config: RunConfig,
    walked: Walked,
    programs: int,
    planes: int,
    owners: int,
    first: int,
    targets: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor] = (),
) -> None:
    """Launch a kernel whose owners walk all tokens from `first` on, and add up the splits.

    planes: of the owners, which are queries or keys.
    biases: of `common_key_backward`, what is added to the keys' scores and its gradient.
    """
    sequence, (heads, head_dim) = walked.query.shape[1], walked.heads
    blocks = triton.cdiv(owners, config.block)
    splits, split_size = split_walk(sequence - first, config.step, blocks * planes, programs)
    parts = [parts_of(target, splits) for target in targets]
    bias, bias_parts = biases[:1], []
    strides: tuple[int, ...] = ()
    flags = {}
    for each in bias:
        length = min(owners, len(each))
        bias_parts = [each.new_empty(splits, len(walked.query), length, heads)]
        strides, flags = each.stride(), {"BIAS": length > 0}
    four = (walked.grad, walked.query, walked.key, walked.value)
    kernel[(blocks * planes * splits,)](
        *four, *bias, walked.lse, walked.delta, *parts, *bias_parts,
        *strides_of(*four), *parts[0].stride()[:2], *strides,
        heads, head_dim, owners, first, sequence, split_size, blocks, planes, *walked.scales,
        M=config.block, N=config.step, **channels(head_dim), GROUP=walked.group,
        STAGES=config.num_stages, **flags,
        num_warps=config.num_warps, num_stages=config.num_stages, **OPTIONS,
    )  # fmt: skip
    add_up(targets, parts)
    for target, part in zip(biases[1:], bias_parts, strict=True):
        target.copy_(part.sum((0, 1)))


def add_up(targets: Sequence[torch.Tensor], parts: Sequence[torch.Tensor]) -> None:
    """Sum what splits wrote, see `parts_of`."""
    for target, part in zip(targets, parts, strict=True):
        if len(part) > 1:
            target.copy_(part.sum(0))


def prepare(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    geometry: Geometry,
) -> Walked:
    """What all launches of a backward pass read; see `attention_backward`."""
    batch, sequence, heads, head_dim = query.shape
    lse_log2, delta = torch.empty(
        2, batch, heads, sequence, dtype=torch.float32, device=query.device
    ).unbind()
    blocks = triton.cdiv(sequence * heads, PREPARE_ROWS)
    prepare_rows[(blocks * batch,)](
        grad, out, lse, lse_log2, delta, *strides_of(grad, out), heads, head_dim, sequence, blocks,
        M=PREPARE_ROWS, **channels(head_dim), **OPTIONS,
    )  # fmt: skip
    return Walked(grad, query, key, value, lse_log2, delta, geometry)


def gradients_of(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pooled_key: torch.Tensor,
    pooled_value: torch.Tensor,
    bias: torch.Tensor,
) -> Gradients:
    """Where the gradients go, contiguous and not yet written."""

    def like(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    return like(query), like(key), like(value), like(pooled_key), like(pooled_value), like(bias)


def text_gradients(
    walked: Walked, config: BackwardConfig, programs: int, grads: Sequence[torch.Tensor]
) -> None:
    """Write the text's part of the gradients of query, key and value."""
    text_length = walked.geometry.text_length
    if not text_length:
        return
    text = [x[:, :text_length] for x in grads]
    no_bias = walked.delta.new_empty(0, walked.heads[0])
    _walk_runs(
        text_query_backward, config.text_query, walked, programs, walked.planes, text_length, 0,
        text[:1],
    )  # fmt: skip
    _walk_runs(
        common_key_backward, config.common_key, walked, programs, walked.key_planes, text_length, 0,
        text[1:], (no_bias, no_bias),
    )  # fmt: skip


def attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pooled_key: torch.Tensor,
    pooled_value: torch.Tensor,
    bias: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    geometry: Geometry,
    *,
    config: BackwardConfig,
    programs: int,
) -> Gradients:
    """Gradients of CLEAR attention, without far keys.

    Args:
        grad: gradient of `out`.
        query, key, value, out, grad: (batch, text + image, heads, head_dim), float16, bfloat16 or
            float32, any strides but channels side by side; summed in float32. Key and value may
            have fewer heads, each for a group of the query's.
        pooled_key, pooled_value: (batch, pooled, the key's heads, head_dim), contiguous; pooled may
            be 0.
        bias: float32 (pooled, heads), any strides, or (0, heads) where nothing is added.
        lse: float32 (batch, text + image, heads), contiguous: natural-log log-sum-exp of the
            scaled scores of all keys a query sees.
        geometry: of the window; all rows are queries.
        config: shapes of the kernels.

    Returns:
        Gradients of query, key, value, pooled_key, pooled_value and bias, contiguous, in their
        dtype.
    """
    pooled_length, text_length = pooled_key.shape[1], geometry.text_length
    grads = gradients_of(query, key, value, pooled_key, pooled_value, bias)
    grad_query, grad_key, grad_value, grad_pooled_key, grad_pooled_value, grad_bias = grads
    walked = prepare(grad, query, key, value, out, lse, geometry)
    _walk_image(
        image_query_backward, config.query, walked, walked.planes,
        (pooled_key, pooled_value, bias),
        (key, value), (grad_query,), (pooled_length, *bias.stride()), BIAS=len(bias) > 0,
    )  # fmt: skip
    _walk_image(
        image_key_backward, config.key, walked, walked.key_planes,
        (), (query, grad), (grad_key, grad_value), (),
    )  # fmt: skip
    text_gradients(walked, config, programs, grads[:3])
    if pooled_length:
        _walk_runs(
            common_key_backward, config.common_key,
            replace(walked, key=pooled_key, value=pooled_value), programs, walked.key_planes,
            pooled_length, text_length, (grad_pooled_key, grad_pooled_value), (bias, grad_bias),
        )  # fmt: skip
    return grads
