"""The backward pass of attention band by band, by PyTorch's operators."""

from __future__ import annotations

import torch

from ..opaque import Geometry, Gradients, channels_contiguous
from .partial import attend_backward, compute_dtype
from .tiles import bands, tile_columns
from .views import (
    Masks,
    add_key_tiles,
    column_major,
    heads_first,
    key_tiles,
    query_tiles,
    tokens_first,
)


def backward_in_bands(
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
    """Gradients of query, key, value, pooled_key, pooled_value and bias; see `attention_op`."""
    height, width, text_length, radius, scale, *_ = geometry
    grad, query, key, value = channels_contiguous(grad, query, key, value)
    pooled_key, pooled_value = channels_contiguous(pooled_key, pooled_value)
    dtype = compute_dtype(query.dtype, query.device)
    sum_dtype = torch.promote_types(dtype, torch.float32)
    grads = [
        torch.zeros(tensor.shape, dtype=sum_dtype, device=tensor.device)
        for tensor in (query, key, value, pooled_key, pooled_value)
    ]
    columns = tile_columns(width, radius)
    masks = Masks(columns, radius, dtype, query.device)
    key_columns = {"columns": columns.key_width, "padding": columns.padding}

    for item in range(query.shape[0]):
        text = [x[item, :text_length].to(dtype) for x in (query, key, value, grad, out)]
        q, k, v, g, o = (x[item, text_length:] for x in (query, key, value, grad, out))
        image_lse = lse[item, text_length:]
        text_lse = heads_first(lse[item, :text_length]).contiguous()
        all_key, all_value = (
            heads_first(torch.cat([part, pooled[item].to(dtype)]))
            for part, pooled in ((text[1], pooled_key), (text[2], pooled_value))
        )
        text_query, text_key, text_value, text_grad, text_out = (heads_first(x) for x in text)
        grad_all_key = torch.zeros_like(all_key, dtype=sum_dtype)
        grad_all_value = torch.zeros_like(all_value, dtype=sum_dtype)
        grad_q, grad_k, grad_v = (x[item, text_length:] for x in grads[:3])
        grad_text = grads[0][item, :text_length]

        if text_length:
            parts = attend_backward(
                text_grad, text_query, text_key, text_value, text_out, text_lse, scale
            )
            grad_text += tokens_first(parts[0])
            grad_all_key[:, :, :text_length] += parts[1]
            grad_all_value[:, :, :text_length] += parts[2]

        for band in bands(height, radius):
            own, reach = slice(band.start, band.stop), slice(band.key_start, band.key_stop)
            own_tokens = slice(own.start * width, own.stop * width)
            if text_length:
                band_key, band_value = (heads_first(x[own_tokens].to(dtype)) for x in (k, v))
                parts = attend_backward(
                    text_grad, text_query, band_key, band_value, text_out, text_lse, scale
                )
                grad_text += tokens_first(parts[0])
                grad_k[own_tokens] += tokens_first(parts[1])
                grad_v[own_tokens] += tokens_first(parts[2])

            q_band, g_band, o_band = (
                column_major(x, width, own, dtype, columns.query_width) for x in (q, g, o)
            )
            l_band = column_major(image_lse, width, own, lse.dtype, columns.query_width)
            k_band = column_major(k, width, reach, dtype, **key_columns)
            v_band = column_major(v, width, reach, dtype, **key_columns)
            grad_q_band = torch.zeros_like(q_band, dtype=sum_dtype)
            grad_k_band = torch.zeros_like(k_band, dtype=sum_dtype)
            grad_v_band = torch.zeros_like(v_band, dtype=sum_dtype)
            for tiles, mask in masks(band):
                parts = attend_backward(
                    query_tiles(g_band, tiles),
                    query_tiles(q_band, tiles),
                    key_tiles(k_band, columns, tiles),
                    key_tiles(v_band, columns, tiles),
                    query_tiles(o_band, tiles),
                    query_tiles(l_band, tiles).contiguous(),
                    scale,
                    mask,
                )
                query_tiles(grad_q_band, tiles).copy_(parts[0])
                add_key_tiles(grad_k_band, columns, tiles, parts[1])
                add_key_tiles(grad_v_band, columns, tiles, parts[2])
            if all_key.shape[2]:
                parts = attend_backward(
                    heads_first(g_band.flatten(0, 1)),
                    heads_first(q_band.flatten(0, 1)),
                    all_key,
                    all_value,
                    heads_first(o_band.flatten(0, 1)),
                    heads_first(l_band.flatten(0, 1)).contiguous(),
                    scale,
                )
                grad_q_band += tokens_first(parts[0]).view_as(grad_q_band)
                grad_all_key += parts[1]
                grad_all_value += parts[2]
            target = grad_q[own_tokens].unflatten(0, (-1, width))
            target.copy_(grad_q_band[:width].transpose(0, 1))
            real = slice(columns.padding, columns.padding + width)
            for whole, part in ((grad_k, grad_k_band), (grad_v, grad_v_band)):
                target = whole[reach.start * width : reach.stop * width].unflatten(0, (-1, width))
                target += part[real].transpose(0, 1)

        for whole, pooled, part in (
            (grads[1], grads[3], grad_all_key),
            (grads[2], grads[4], grad_all_value),
        ):
            whole[item, :text_length] += tokens_first(part)[:text_length]
            pooled[item] = tokens_first(part)[text_length:]
    dq, dk, dv, dpk, dpv = (x.to(query.dtype) for x in grads)
    return dq, dk, dv, dpk, dpv, torch.zeros_like(bias)
