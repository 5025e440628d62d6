"""From tensors to kernel launches: the forward pass of CLEAR attention."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from ..groups import group_of
from ..opaque import Geometry
from .cell_lists import key_comparisons, key_lists, of_lists
from .dense import text_forward, text_merge
from .device import architecture
from .far import far_forward
from .forward import image_forward
from .geometry import visits
from .tables import ForwardConfig, RunConfig

# More parts than this cost more memory and merging than they gain in even load.
MOST_SPLITS = 32
MERGE_ROWS = 16
# Multiply-add in one instruction: Triton's default up to 3.9, chosen here on purpose.
OPTIONS = {"enable_fp_fusion": True}


def channels(head_dim: int) -> dict[str, int | bool]:
    """The power of two that holds head_dim, and whether it is head_dim."""
    block = max(16, triton.next_power_of_2(head_dim))
    return {"D": block, "EVEN_D": block == head_dim}


def scale_of(scale: float) -> dict[str, float | bool]:
    """The scale as the forward kernels take it: for scores in units of log2, above 0, and its sign.

    Instead of 0 comes a number that leaves nothing of any score, but -inf as it is.
    """
    return {"scale_log2": max(abs(scale) * math.log2(math.e), 1e-30), "NEGATIVE": scale < 0}


def table_key(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, int, int]:
    """What the tables are asked by: architecture, channels, element size."""
    return architecture(device), int(channels(head_dim)["D"]), dtype.itemsize


def readable_by_descriptor(tokens: torch.Tensor) -> bool:
    """Whether tensor descriptors can read (batch, sequence, heads, head_dim) tokens (TMA's rules).

    Text may come first: a token is then a multiple of 16 bytes too. Expanded tokens, whose strides
    are zero, are not for it.
    """
    size = tokens.element_size()
    strides = all(stride > 0 and stride * size % 16 == 0 for stride in tokens.stride()[:3])
    return strides and tokens.data_ptr() % 16 == 0 and tokens.stride(-1) == 1


def image_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pooled_key: torch.Tensor,
    pooled_value: torch.Tensor,
    bias: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    geometry: Geometry,
    config: ForwardConfig,
) -> None:
    """Write the image tokens' part of `out` and `lse`, both contiguous; without far keys.

    Keys and values are `readable_by_descriptor` where the entry asks for it.
    """
    height, width, text_length, radius, scale, start, stop, *_ = geometry
    batch, queries, heads, head_dim = query.shape
    tiling = config.tiling
    text_queries = queries - geometry.image_queries
    found = visits(height, width, radius, tiling, query.device, (start, stop))
    size = channels(head_dim)
    pooled = pooled_key.shape[1]
    tokens: list[Any] = [key, value, pooled_key, pooled_value]
    images: list[Any] = [x[:, text_length:] for x in (key, value)]
    if config.descriptor:
        run = [1, config.dense_keys, 1, size["D"]]
        tile = [1, tiling.step_rows, tiling.step_columns, 1, size["D"]]
        # None is made of nothing.
        tokens = [TensorDescriptor.from_tensor(x, run) if x.numel() else x for x in tokens]
        images = [
            TensorDescriptor.from_tensor(x.unflatten(1, (height, width)), tile) for x in images
        ]
    tiles_y, tiles_x = found.row_class.numel(), found.column_class.numel()
    image_forward[(tiles_y * tiles_x * heads * batch,)](
        query, *tokens, bias, *images, out, lse,
        found.offsets, found.ranges, found.row_class, found.column_class,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *bias.stride(),
        heads, head_dim, height, width, text_length, pooled,
        start, stop, text_queries,
        tiles_x, tiles_y * tiles_x, found.ranges.shape[1], radius, **scale_of(scale),
        R=tiling.rows, C=tiling.columns, STEP_R=tiling.step_rows, STEP_C=tiling.step_columns,
        N=config.dense_keys, **size, EVEN_TEXT=text_length % config.dense_keys == 0,
        POOLED=pooled > 0, BIAS=len(bias) > 0, DESCRIPTOR=config.descriptor,
        GROUP=group_of(query, key), STAGES=config.num_stages,
        num_warps=config.num_warps, num_stages=config.num_stages, **OPTIONS,
    )  # fmt: skip


def far_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pooled_key: torch.Tensor,
    pooled_value: torch.Tensor,
    bias: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    geometry: Geometry,
    config: ForwardConfig,
) -> None:
    """`image_attention` with far keys."""
    _, width, text_length, _, scale, start, stop, *_ = geometry
    batch, queries, heads, head_dim = query.shape
    tiling, text_queries = config.tiling, queries - geometry.image_queries
    shared = of_lists(geometry)
    lists = key_lists(shared, tiling.rows, tiling.columns, config.far_keys, query.device)
    table = key_comparisons(shared, query.device)
    tiles, tiles_x = len(lists.ranges), triton.cdiv(width, tiling.columns)
    far_forward[(tiles * heads * batch,)](
        query, key, value, key[:, text_length:], value[:, text_length:], pooled_key, pooled_value,
        bias, out, lse, lists.keys, lists.ranges, table,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *bias.stride(),
        heads, head_dim, width, text_length, key.shape[1] - text_length, table.shape[1],
        start, stop, text_queries, tiles_x, tiles, **scale_of(scale),
        R=tiling.rows, C=tiling.columns, N=config.dense_keys, STEP=config.far_keys,
        **channels(head_dim), EVEN_TEXT=text_length % config.dense_keys == 0,
        GROUP=group_of(query, key), STAGES=config.num_stages,
        num_warps=config.num_warps, num_stages=config.num_stages, **OPTIONS,
    )  # fmt: skip


def text_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    text_length: int,
    scale: float,
    config: RunConfig,
    programs: int,
) -> None:
    """Write the text tokens' part of `out` and `lse`, both contiguous.

    programs: how many the device should have; the keys are split accordingly.
    """
    batch, queries, heads, head_dim = query.shape
    sequence = key.shape[1]
    size = channels(head_dim)
    blocks, planes = triton.cdiv(text_length, config.block), batch * heads
    splits = min(MOST_SPLITS, triton.cdiv(programs, blocks * planes))
    per_split = triton.cdiv(triton.cdiv(sequence, splits), config.step) * config.step
    splits = triton.cdiv(sequence, per_split)
    part_out = query.new_empty(splits, batch, text_length, heads, head_dim, dtype=torch.float32)
    part_lse = part_out.new_empty(part_out.shape[:-1])
    tokens: list[Any] = [key, value]
    descriptor = config.descriptor and all(map(readable_by_descriptor, tokens))
    if descriptor:
        run = [1, config.step, 1, size["D"]]
        tokens = [TensorDescriptor.from_tensor(x, run) for x in tokens]
    text_forward[(blocks * planes * splits,)](
        query, *tokens, part_out, part_lse,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        heads, head_dim, text_length, sequence, per_split, blocks, planes,
        **scale_of(scale), M=config.block, N=config.step, **size, DESCRIPTOR=descriptor,
        GROUP=group_of(query, key), STAGES=config.num_stages,
        num_warps=config.num_warps, num_stages=config.num_stages, **OPTIONS,
    )  # fmt: skip
    rows = batch * text_length * heads
    text_merge[(triton.cdiv(rows, MERGE_ROWS),)](
        part_out, part_lse, out, lse,
        rows, text_length * heads, queries * heads, splits, head_dim,
        M=MERGE_ROWS, **size, num_warps=4, **OPTIONS,
    )  # fmt: skip
