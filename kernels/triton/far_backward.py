"""Gradients of attention with far keys; the formulas are in backward.py.

An image query walks its tile's list of keys, as in the forward pass. A token or a cell walks the
query tiles that may see its tile, a level at a time: coarse levels are few owners with long walks,
which are split over programs; the parts are added in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..cells import cell_count
from ..opaque import Geometry, Gradients
from .backward import (
    Walked,
    add_key_gradients,
    add_query_gradient,
    add_up,
    gradients_of,
    locate_tile,
    parts_of,
    prepare,
    split_walk,
    strides_of,
    text_gradients,
    walk_keys,
    walk_queries,
)
from .cell_lists import first_keys, key_comparisons, key_lists, of_lists, query_lists
from .far import load_step, own_tile
from .forward import load_tile
from .launch import OPTIONS, channels
from .primitives import load_bias, load_rows, store_rows
from .tables import BackwardConfig, TileConfig


@triton.jit
def walk_listed(
    query_sum, query, grad, lse, delta, image_key, image_value, pooled_key, pooled_value, bias,
    key_stride, value_stride, pooled_stride, bias_stride,
    keys, begin, end, token_keys, total, comparisons, own_y, own_x, origin_y, origin_x,
    scale_log2, head_dim,
    N: tl.constexpr, D: tl.constexpr, EVEN_D: tl.constexpr, MASKED: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """`add_query_gradient` over the keys begin..end of the lists; see `load_step`."""
    for step in tl.range(begin, end, N, num_stages=STAGES):
        k, v, mask, b = load_step(
            image_key, image_value, pooled_key, pooled_value, bias,
            key_stride, value_stride, pooled_stride, bias_stride,
            keys, step, end, token_keys, total, comparisons, own_y, own_x, origin_y, origin_x,
            head_dim, N, D, EVEN_D, MASKED,
        )  # fmt: skip
        query_sum = add_query_gradient(
            query_sum, query, grad, lse, delta, k, v, mask, b, scale_log2, MASKED, True
        )
    return query_sum


@triton.jit
def far_query_backward(
    grad, query, key, value, image_key, image_value, pooled_key, pooled_value, bias, lse, delta,
    grad_query, keys, ranges, comparisons,
    grad_batch, grad_token, grad_head, query_batch, query_token, query_head,
    key_batch, key_token, key_head, value_batch, value_token, value_head, bias_token, bias_head,
    heads, head_dim, height, width, text_length, token_keys, total, tiles_x, tiles,
    scale, scale_log2,
    R: tl.constexpr, C: tl.constexpr, N: tl.constexpr, D: tl.constexpr, EVEN_D: tl.constexpr,
    GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradient of the image queries; one program per query tile, head and batch item.

    Arguments as those of `image_query_backward` and of `far_forward`.
    """
    tile, plane = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    batch, head = (plane // heads).to(tl.int64), (plane % heads).to(tl.int64)
    key_heads, own_key_head = heads // GROUP, head // GROUP
    tile_y, tile_x, own_y, own_x, valid = own_tile(tile, tiles_x, 0, height, width, R, C)
    tokens = text_length + own_y * width + own_x
    sequence = text_length + height * width
    grad += batch * grad_batch + head * grad_head
    query += batch * query_batch + head * query_head
    key += batch * key_batch + own_key_head * key_head
    value += batch * value_batch + own_key_head * value_head
    image_key += batch * key_batch + own_key_head * key_head
    image_value += batch * value_batch + own_key_head * value_head
    pooled = (batch * (total - token_keys) * key_heads + own_key_head) * head_dim
    g = load_rows(grad, grad_token, tokens, valid, head_dim, D, EVEN_D)
    q = load_rows(query, query_token, tokens, valid, head_dim, D, EVEN_D)
    row = plane.to(tl.int64) * sequence
    row_lse = tl.load(lse + row + tokens, mask=valid, other=0.0)
    row_delta = tl.load(delta + row + tokens, mask=valid, other=0.0)

    query_sum = walk_keys(
        tl.zeros([R * C, D], tl.float32), q, g, row_lse, row_delta, key, value, key_token,
        value_token, 0, text_length, scale_log2, head_dim, None, 0, N, D, EVEN_D, False, STAGES,
    )  # fmt: skip
    begin, border, end = (
        tl.load(ranges + 3 * tile), tl.load(ranges + 3 * tile + 1), tl.load(ranges + 3 * tile + 2)
    )  # fmt: skip
    own_y, own_x = 2 * (own_y - tile_y), 2 * (own_x - tile_x)
    query_sum = walk_listed(
        query_sum, q, g, row_lse, row_delta, image_key, image_value, pooled_key + pooled,
        pooled_value + pooled, bias + head * bias_head,
        key_token, value_token, key_heads * head_dim, bias_token,
        keys, begin, border, token_keys, total, comparisons, own_y, own_x, 2 * tile_y, 2 * tile_x,
        scale_log2, head_dim, N, D, EVEN_D, False, STAGES,
    )  # fmt: skip
    query_sum = walk_listed(
        query_sum, q, g, row_lse, row_delta, image_key, image_value, pooled_key + pooled,
        pooled_value + pooled, bias + head * bias_head,
        key_token, value_token, key_heads * head_dim, bias_token,
        keys, border, end, token_keys, total, comparisons, own_y, own_x, 2 * tile_y, 2 * tile_x,
        scale_log2, head_dim, N, D, EVEN_D, True, STAGES,
    )  # fmt: skip
    grad_query += (batch * sequence * heads + head) * head_dim
    store_rows(grad_query, heads * head_dim, tokens, valid, query_sum * scale, head_dim, D, EVEN_D)


@triton.jit
def nearer(own_y, own_x, reach2, y, x, M: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Which queries of the R x C tile at (y, x) are within reach of cells, bool [M, R * C].

    own_y, own_x, reach2: of the cells, doubled; see `Comparisons`.
    """
    dy = own_y[:, None] - 2 * (y + tl.arange(0, R))[None, :]
    dx = own_x[:, None] - 2 * (x + tl.arange(0, C))[None, :]
    room = reach2[:, None] - dy * dy
    return tl.reshape((dx * dx)[:, None, :] < room[:, :, None], [M, R * C])


@triton.jit
def far_key_backward(
    grad, query, key, value, bias, image_query, image_grad, lse, delta,
    key_part, value_part, bias_part, visited, ranges, comparisons,
    grad_batch, grad_token, grad_head, query_batch, query_token, query_head,
    key_batch, key_token, key_head, value_batch, value_token, value_head,
    part_split, part_batch, bias_token, bias_head,
    heads, head_dim, height, width, text_length, rows, columns, total,
    tiles_x, tiles, query_tiles_x, tiles_per_split, planes, scale, scale_log2,
    R: tl.constexpr, C: tl.constexpr, STEP_R: tl.constexpr, STEP_C: tl.constexpr,
    D: tl.constexpr, EVEN_D: tl.constexpr, BIAS: tl.constexpr, GROUP: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of one level's cells from one split of the query tiles that may see it.

    key, value: (batch, rows * columns or more, heads / GROUP, head_dim), from the level's first
    cell on, as comparisons (6, total). Where not BIAS these are the image's tokens, which text
    queries see too. key_part, value_part: (splits, batch, rows * columns, heads / GROUP, head_dim),
    strides part_split and part_batch, else contiguous; bias_part, where BIAS: float32 (splits,
    batch, rows * columns, heads), contiguous. visited, ranges: see `QueryLists`. planes: of key
    heads.
    """
    M: tl.constexpr = R * C
    N: tl.constexpr = STEP_R * STEP_C
    tile, rest = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    plane, split = rest % planes, rest // planes
    key_heads = heads // GROUP
    batch, own_key_head = (plane // key_heads).to(tl.int64), (plane % key_heads).to(tl.int64)
    _, _, own_y, own_x, valid = own_tile(tile, tiles_x, 0, rows, columns, R, C)
    cells = own_y * columns + own_x
    key += batch * key_batch + own_key_head * key_head
    value += batch * value_batch + own_key_head * value_head
    k = load_rows(key, key_token, cells, valid, head_dim, D, EVEN_D)
    v = load_rows(value, value_token, cells, valid, head_dim, D, EVEN_D)
    inner_y, inner_x = tl.load(comparisons + cells), tl.load(comparisons + total + cells)
    inner2 = tl.load(comparisons + 2 * total + cells)
    outer_y = tl.load(comparisons + 3 * total + cells)
    outer_x = tl.load(comparisons + 4 * total + cells)
    outer2 = tl.load(comparisons + 5 * total + cells)

    key_sum = tl.zeros([M, D], tl.float32)
    value_sum = tl.zeros([M, D], tl.float32)
    for member in range(GROUP):
        head = own_key_head * GROUP + member
        of_query, of_grad = (
            batch * query_batch + head * query_head, batch * grad_batch + head * grad_head
        )  # fmt: skip
        row = (plane.to(tl.int64) * GROUP + member) * (text_length + height * width)
        b = load_bias(bias + head * bias_head, bias_token, cells, valid, BIAS)
        bias_sum = tl.zeros([M], tl.float32)
        if not BIAS:
            key_sum, value_sum, bias_sum = walk_queries(
                key_sum, value_sum, bias_sum, k, v, b, query + of_query, grad + of_grad,
                lse + row, delta + row, query_token, grad_token,
                0, tl.where(split == 0, text_length, 0), scale_log2, head_dim,
                N, D, EVEN_D, False, STAGES,
            )  # fmt: skip
        row += text_length
        begin = tl.load(ranges + tile) + split * tiles_per_split
        end = tl.minimum(begin + tiles_per_split, tl.load(ranges + tile + 1))
        for step in tl.range(begin, end, num_stages=STAGES):
            number = tl.load(visited + step)
            y, x = number // query_tiles_x * STEP_R, number % query_tiles_x * STEP_C
            q = load_tile(
                image_query + of_query, query_token, batch, head, y, x, height, width, head_dim,
                STEP_R, STEP_C, D, EVEN_D, True, False,
            )  # fmt: skip
            g = load_tile(
                image_grad + of_grad, grad_token, batch, head, y, x, height, width, head_dim,
                STEP_R, STEP_C, D, EVEN_D, True, False,
            )  # fmt: skip
            # Queries beyond the border have no probability: 1 times a cell's count overflows
            # float16.
            tokens, exists = locate_tile(y, x, height, width, STEP_R, STEP_C, True)
            row_lse = tl.load(lse + row + tokens, mask=exists, other=float("inf"))
            row_delta = tl.load(delta + row + tokens, mask=exists, other=0.0)
            within = nearer(outer_y, outer_x, outer2, y, x, M, STEP_R, STEP_C)
            inside = nearer(inner_y, inner_x, inner2, y, x, M, STEP_R, STEP_C)
            key_sum, value_sum, bias_sum = add_key_gradients(
                key_sum, value_sum, bias_sum, k, v, b, q, g, row_lse, row_delta,
                within & (inside == 0), scale_log2, True, BIAS,
            )  # fmt: skip
        if BIAS:
            row = (split.to(tl.int64) * (planes // key_heads) + batch) * rows * columns * heads
            row += head
            tl.store(bias_part + row + cells.to(tl.int64) * heads, bias_sum, mask=valid)

    start = split.to(tl.int64) * part_split + batch * part_batch + own_key_head * head_dim
    stride = key_heads * head_dim
    store_rows(key_part + start, stride, cells, valid, key_sum * scale, head_dim, D, EVEN_D)
    store_rows(value_part + start, stride, cells, valid, value_sum, head_dim, D, EVEN_D)


def far_attention_backward(
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
    """`attention_backward` with far keys: pooled keys are the cells of every level."""
    _, _, text_length, *_ = geometry
    grads = gradients_of(query, key, value, pooled_key, pooled_value, bias)
    grad_query, grad_key, grad_value, grad_pooled_key, grad_pooled_value, grad_bias = grads
    walked = prepare(grad, query, key, value, out, lse, geometry)
    _walk_lists(walked, pooled_key, pooled_value, bias, grad_query, config.far_query)
    first = first_keys(geometry)
    _walk_level(
        walked, 0, bias, [key[:, text_length:], value[:, text_length:]],
        [grad_key[:, text_length:], grad_value[:, text_length:]], grad_bias,
        config.far_key, programs,
    )  # fmt: skip
    for level in range(1, geometry.far_levels + 1):
        cells = slice(first[level] - first[1], first[level + 1] - first[1])
        _walk_level(
            walked, level, bias[cells], [pooled_key[:, cells], pooled_value[:, cells]],
            [grad_pooled_key[:, cells], grad_pooled_value[:, cells]], grad_bias[cells],
            config.far_key, programs,
        )  # fmt: skip
    text_gradients(walked, config, programs, grads[:3])
    return grads


def _walk_lists(
    walked: Walked,
    pooled_key: torch.Tensor,
    pooled_value: torch.Tensor,
    bias: torch.Tensor,
    grad_query: torch.Tensor,
    config: TileConfig,
) -> None:
    """Write the image's part of the gradient of the queries."""
    height, width, text_length, *_ = walked.geometry
    device, shared, tiling = walked.query.device, of_lists(walked.geometry), config.tiling
    step = tiling.step_rows * tiling.step_columns
    lists = key_lists(shared, tiling.rows, tiling.columns, step, device)
    table = key_comparisons(shared, device)
    tiles = len(lists.ranges)
    image = [x[:, text_length:] for x in (walked.key, walked.value)]
    four = (walked.grad, walked.query, walked.key, walked.value)
    far_query_backward[(tiles * walked.planes,)](
        *four, *image, pooled_key, pooled_value, bias, walked.lse, walked.delta, grad_query,
        lists.keys, lists.ranges, table, *strides_of(*four), *bias.stride(),
        *walked.heads, height, width, text_length, height * width, table.shape[1],
        triton.cdiv(width, tiling.columns), tiles, *walked.scales,
        R=tiling.rows, C=tiling.columns, N=step, **channels(walked.heads[1]), GROUP=walked.group,
        STAGES=config.num_stages,
        num_warps=config.num_warps, num_stages=config.num_stages, **OPTIONS,
    )  # fmt: skip


def _walk_level(
    walked: Walked,
    level: int,
    bias: torch.Tensor,
    keys: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    grad_bias: torch.Tensor,
    config: TileConfig,
    programs: int,
) -> None:
    """Write the gradients of one level's keys, values and, but for tokens, biases."""
    height, width, text_length, *_ = walked.geometry
    device, shared, tiling = walked.query.device, of_lists(walked.geometry), config.tiling
    lists = query_lists(shared, level, tiling, device)
    if level and not lists.longest:  # a level more than the grid needs
        for each in (*targets, grad_bias):
            each.zero_()
        return
    table = key_comparisons(shared, device)[:, first_keys(shared)[level] :]
    rows, columns = cell_count(height, level), cell_count(width, level)
    tiles, (heads, head_dim) = len(lists.ranges) - 1, walked.heads
    splits, per_split = split_walk(lists.longest, 1, tiles * walked.key_planes, programs)
    parts = [parts_of(target, splits) for target in targets]
    bias_part = walked.delta.new_empty(splits, len(walked.query), len(bias), heads)
    image = [x[:, text_length:] for x in (walked.query, walked.grad)]
    four = (walked.grad, walked.query, *keys)
    far_key_backward[(tiles * walked.key_planes * splits,)](
        *four, bias, *image, walked.lse, walked.delta, *parts, bias_part,
        lists.tiles, lists.ranges, table, *strides_of(*four), *parts[0].stride()[:2],
        *bias.stride(), heads, head_dim, height, width, text_length, rows, columns,
        table.stride(0), triton.cdiv(columns, tiling.columns), tiles,
        triton.cdiv(width, tiling.step_columns), per_split, walked.key_planes, *walked.scales,
        R=tiling.rows, C=tiling.columns, STEP_R=tiling.step_rows, STEP_C=tiling.step_columns,
        **channels(head_dim), BIAS=level > 0, GROUP=walked.group, STAGES=config.num_stages,
        num_warps=config.num_warps, num_stages=config.num_stages, **OPTIONS,
    )  # fmt: skip
    add_up(targets, parts)
    if level:
        grad_bias.copy_(bias_part.sum((0, 1)))
