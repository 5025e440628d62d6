"""CLEAR attention by Triton kernels: linear memory, no mask tensor, forward and backward."""

from __future__ import annotations

import torch

from ..groups import group_of
from ..opaque import Attention, Geometry, Gradients, attention_op, channels_contiguous
from . import tables
from .backward import attention_backward
from .device import Kernel, programs
from .entry import attention_of
from .failures import without_choice
from .far_backward import far_attention_backward
from .launch import readable_by_descriptor, table_key, text_attention
from .tuning import Kind, pinned, run_fastest, run_pinned, size_class


def triton_dense_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`dense_attention` by the kernel of the text queries."""
    query, key, value = channels_contiguous(query, key, value)
    kernel = Kernel(query.device, query.dtype, query.shape[-1], "text", group_of(query, key))
    out = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    lse = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
    with torch.cuda.device_of(query), without_choice(kernel):
        text_attention(
            query, key, value, out, lse, query.shape[1], scale,
            tables.text_config(*table_key(*kernel[:3])), programs(query.device),
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
    far, pooled = geometry.far_levels > 0, pooled_key.shape[1] > 0
    name = "far" if far else "pooled" if pooled else "forward"
    kernel = Kernel(query.device, query.dtype, query.shape[-1], name, group_of(query, key))
    entry_key = table_key(*kernel[:3])
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)

    def run(entry: tables.AnyForwardConfig) -> None:
        attention_of(entry, far)(
            query, key, value, pooled_key, pooled_value, bias, out, lse, geometry, entry
        )

    # Far keys, and what is beside them, are gathered by pointers.
    readable = far or all(map(readable_by_descriptor, (key, value, pooled_key, pooled_value)))
    entries = tables.forward_configs(*entry_key, far=far)
    chosen = pinned(entries, readable)
    with torch.cuda.device_of(query):
        if query.shape[1] > geometry.image_queries:
            with without_choice(kernel._replace(name="text")):
                text_attention(
                    query, key, value, out, lse, geometry.text_length, geometry.scale,
                    tables.text_config(*entry_key), programs(query.device),
                )  # fmt: skip
        if chosen is not None:
            run_pinned(chosen, kernel, run)
        else:
            usable = [entry for entry in entries if readable or not entry.descriptor]
            size = size_class(query.shape[0] * geometry.image_queries * query.shape[2])
            kind = Kind(kernel, geometry.radius, geometry.text_length > 0, size)
            run_fastest(usable, kind, run)
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
    far = geometry.far_levels > 0
    name = "backward far" if far else "backward"
    kernel = Kernel(query.device, query.dtype, query.shape[-1], name, group_of(query, key))
    backward = far_attention_backward if far else attention_backward
    with torch.cuda.device_of(query), without_choice(kernel):
        return backward(
            grad, query, key, value, pooled_key, pooled_value, bias, out, lse, geometry,
            config=tables.backward_config(*table_key(*kernel[:3])),
            programs=programs(query.device),
        )  # fmt: skip


triton_attention: Attention = attention_op("triton", _forward, _backward)
