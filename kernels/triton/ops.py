"""CLEAR attention by Triton kernels: linear memory, no mask tensor, forward and backward."""

from __future__ import annotations

from functools import partial

import torch

from ..opaque import Geometry, Gradients, attention_op, channels_contiguous
from . import tables
from .backward import attention_backward
from .device import programs
from .far_backward import far_attention_backward
from .launch import (
    far_attention,
    image_attention,
    readable_by_descriptor,
    table_key,
    text_attention,
)
from .tuning import choose


def triton_dense_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`dense_attention` by the kernel of the text queries."""
    query, key, value = channels_contiguous(query, key, value)
    entry_key = table_key(query.device, query.dtype, query.shape[-1])
    out = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    lse = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
    with torch.cuda.device_of(query):
        text_attention(
            query, key, value, out, lse, query.shape[1], scale,
            tables.text_config(*entry_key), programs(query.device),
        )  # fmt: skip
    return out, lse


def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pooled_key: torch.Tensor,
    pooled_value: torch.Tensor,
    bias: torch.Tensor,
    geometry: Geometry,
) -> tuple[torch.Tensor, torch.Tensor]:
    query, key, value = channels_contiguous(query, key, value)
    pooled_key, pooled_value = pooled_key.contiguous(), pooled_value.contiguous()
    entry_key = table_key(query.device, query.dtype, query.shape[-1])
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
    if query.shape[1] > geometry.image_queries:
        with torch.cuda.device_of(query):
            text_attention(
                query, key, value, out, lse, geometry.text_length, geometry.scale,
                tables.text_config(*entry_key), programs(query.device),
            )  # fmt: skip
    attention = far_attention if geometry.far_levels else image_attention
    run = partial(attention, query, key, value, pooled_key, pooled_value, bias, out, lse, geometry)
    entries = tables.forward_configs(*entry_key, far=geometry.far_levels > 0)
    if not all(map(readable_by_descriptor, (key, value, pooled_key, pooled_value))):
        entries = tuple(entry for entry in entries if not entry.descriptor)
    kind = (
        query.device, query.dtype, query.shape[-1],
        geometry.radius, geometry.text_length > 0, pooled_key.shape[1] > 0,
        geometry.far_levels > 0,
    )  # fmt: skip
    with torch.cuda.device_of(query):
        run(choose(entries, kind, run))
    return out, lse


def _backward(
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
) -> Gradients:
    grad, query, key, value = channels_contiguous(grad, query, key, value)
    pooled_key, pooled_value = pooled_key.contiguous(), pooled_value.contiguous()
    entry_key = table_key(query.device, query.dtype, query.shape[-1])
    backward = far_attention_backward if geometry.far_levels else attention_backward
    with torch.cuda.device_of(query):
        return backward(
            grad, query, key, value, pooled_key, pooled_value, bias, out, lse, geometry,
            config=tables.backward_config(*entry_key), programs=programs(query.device),
        )  # fmt: skip


triton_attention = attention_op("triton", _forward, _backward)
