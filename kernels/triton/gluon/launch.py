"""From tensors to a launch of the Hopper kernel."""

from __future__ import annotations

from typing import Any

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ...groups import group_of
from ...opaque import Geometry
from ..launch import OPTIONS, channels, scale_of
from ..tables import GluonConfig
from .kernel import image_forward
from .lists import SIDE, paired_visits

DTYPES: dict[torch.dtype, Any] = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


def _descriptor(tokens: torch.Tensor, block: list[int]) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=len(block))
    return TensorDescriptor.from_tensor(tokens, block, layout)


def gluon_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pooled_key: torch.Tensor,
    pooled_value: torch.Tensor,
    bias: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    geometry: Geometry,
    config: GluonConfig,
) -> None:
    """`image_attention` by the Hopper kernel; key and value as tensor descriptors read them."""
    height, width, text_length, radius, scale, start, stop, *_ = geometry
    batch, queries, heads, head_dim = query.shape
    size = channels(head_dim)
    found = paired_visits(height, width, radius, query.device, (start, stop))
    pooled = pooled_key.shape[1] > 0
    runs = (key, value, pooled_key, pooled_value) if pooled else (key, value)
    dense = [_descriptor(x, [1, SIDE * SIDE, 1, size["D"]]) for x in runs]
    if not pooled:
        dense *= 2  # nothing reads the second pair
    image = [
        _descriptor(x[:, text_length:].unflatten(1, (height, width)), [1, SIDE, SIDE, 1, size["D"]])
        for x in (key, value)
    ]
    tiles_y, tiles_x = found.row_class.numel(), found.column_class.numel()
    image_forward[(tiles_y * tiles_x * heads * batch,)](
        query, *dense, *image, bias, out, lse,
        found.offsets, found.lists, found.ranges, found.row_class, found.column_class,
        *query.stride()[:3], *bias.stride(),
        heads, head_dim, height, width, text_length, pooled_key.shape[1], start, stop,
        queries - geometry.image_queries,
        tiles_x, tiles_y * tiles_x, found.ranges.shape[1], radius**2,
        scale_of(scale)["scale_log2"], float((scale > 0) - (scale < 0)),
        **size, POOLED=pooled, BIAS=len(bias) > 0, GROUP=group_of(query, key),
        STAGES=config.num_stages,
        LAYOUT=gl.NVMMASharedLayout.get_default_for(
            [SIDE * SIDE, size["D"]], DTYPES[query.dtype]
        ),
        num_warps=4, **OPTIONS,
    )  # fmt: skip
