"""The backward pass of attention band by band, by PyTorch's operators."""

from __future__ import annotations

import torch

from ..opaque import Geometry, Gradients, channels_contiguous
from .lists import keys_of_tiles
from .partial import attend_backward, compute_dtype
from .tiles import bands, tile_columns
from .views import column_major, dense_bias, dense_keys, heads_first, query_tiles, tokens_first

# Channels more where there is a bias: one is used, the others keep rows aligned.
ROOM = 8


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
    """Gradients of query, key, value, pooled_key, pooled_value and bias; see `attention_op`.

    A bias is like one more channel of the keys, where all queries have a one: there the gradient of
    a key is that of its bias, times scale. So image queries get a channel of ones, everything else
    one of zeros.
    """
    height, width, text_length, radius, scale, *_ = geometry
    grad, query, key, value = channels_contiguous(grad, query, key, value)
    pooled_key, pooled_value = channels_contiguous(pooled_key, pooled_value)
    dtype = compute_dtype(query.dtype, query.device)
    sum_dtype = torch.promote_types(dtype, torch.float32)
    head_dim, room = query.shape[-1], ROOM if len(bias) else 0
    grads = [
        torch.zeros(*x.shape[:-1], head_dim + room, dtype=sum_dtype, device=x.device)
        for x in (query, key, value, pooled_key, pooled_value)
    ]
    keys = keys_of_tiles(geometry, bias, grads[0].shape[2:].numel(), sum_dtype)
    query_width = tile_columns(width, radius).query_width
    dense_mask = dense_bias(bias, geometry, sum_dtype)

    def wide(tokens: torch.Tensor) -> torch.Tensor:
        if not room:
            return tokens
        wide = tokens.new_zeros(*tokens.shape[:-1], head_dim + room)
        wide[..., :head_dim] = tokens
        return wide

    for item in range(query.shape[0]):
        text = [wide(x[item, :text_length].to(dtype)) for x in (query, key, value, grad, out)]
        q, k, v, g, o = (x[item, text_length:] for x in (query, key, value, grad, out))
        image_lse = lse[item, text_length:]
        text_lse = heads_first(lse[item, :text_length]).contiguous()
        dense_key, dense_value = (
            heads_first(wide(dense_keys(x[item], pooled[item], geometry).to(dtype)))
            for x, pooled in ((key, pooled_key), (value, pooled_value))
        )
        text_query, text_key, text_value, text_grad, text_out = (heads_first(x) for x in text)
        grad_dense_key = torch.zeros_like(dense_key, dtype=sum_dtype)
        grad_dense_value = torch.zeros_like(dense_value, dtype=sum_dtype)
        grad_q, grad_k, grad_v = (x[item, text_length:] for x in grads[:3])
        grad_pooled_key, grad_pooled_value = (x[item] for x in grads[3:])
        grad_text = grads[0][item, :text_length]

        if text_length:
            parts = attend_backward(
                text_grad, text_query, text_key, text_value, text_out, text_lse, scale
            )
            grad_text += tokens_first(parts[0])
            grad_dense_key[:, :, :text_length] += parts[1]
            grad_dense_value[:, :, :text_length] += parts[2]

        for band in bands(height, radius):
            own = slice(band.start, band.stop)
            own_tokens = slice(own.start * width, own.stop * width)
            if text_length:
                band_key, band_value = (heads_first(wide(x[own_tokens].to(dtype))) for x in (k, v))
                parts = attend_backward(
                    text_grad, text_query, band_key, band_value, text_out, text_lse, scale
                )
                grad_text += tokens_first(parts[0])
                grad_k[own_tokens] += tokens_first(parts[1])
                grad_v[own_tokens] += tokens_first(parts[2])

            q_band, g_band, o_band = (
                wide(column_major(x, width, own, dtype, query_width)) for x in (q, g, o)
            )
            q_band[..., head_dim : head_dim + 1] = 1  # no channel where there is no room
            l_band = column_major(image_lse, width, own, lse.dtype, query_width)
            k_band = wide(keys.copy(k, pooled_key[item], band, dtype))
            v_band = wide(keys.copy(v, pooled_value[item], band, dtype))
            grad_q_band = torch.zeros_like(q_band, dtype=sum_dtype)
            grad_k_band = torch.zeros_like(k_band, dtype=sum_dtype)
            grad_v_band = torch.zeros_like(v_band, dtype=sum_dtype)
            for group in keys.groups(band):
                tiles = group.tiles
                parts = attend_backward(
                    query_tiles(g_band, tiles),
                    query_tiles(q_band, tiles),
                    keys.take(k_band, group),
                    keys.take(v_band, group),
                    query_tiles(o_band, tiles),
                    query_tiles(l_band, tiles).contiguous(),
                    scale,
                    group.mask,
                )
                query_tiles(grad_q_band, tiles).copy_(parts[0])
                keys.add(grad_k_band, group, parts[1])
                keys.add(grad_v_band, group, parts[2])
            if dense_key.shape[2]:
                parts = attend_backward(
                    heads_first(g_band.flatten(0, 1)),
                    heads_first(q_band.flatten(0, 1)),
                    dense_key,
                    dense_value,
                    heads_first(o_band.flatten(0, 1)),
                    heads_first(l_band.flatten(0, 1)).contiguous(),
                    scale,
                    dense_mask,
                )
                grad_q_band += tokens_first(parts[0]).view_as(grad_q_band)
                grad_dense_key += parts[1]
                grad_dense_value += parts[2]
            target = grad_q[own_tokens].unflatten(0, (-1, width))
            target.copy_(grad_q_band[:width].transpose(0, 1))
            keys.add_copy(grad_k, grad_pooled_key, band, grad_k_band)
            keys.add_copy(grad_v, grad_pooled_value, band, grad_v_band)

        for whole, pooled, part in (
            (grads[1], grad_pooled_key, grad_dense_key),
            (grads[2], grad_pooled_value, grad_dense_value),
        ):
            whole[item, :text_length] += tokens_first(part)[:text_length]
            if not geometry.far_levels:
                pooled += tokens_first(part)[text_length:]
    grad_bias = grads[3][..., head_dim : head_dim + 1].sum((0, 3)) / scale
    dq, dk, dv, dpk, dpv = (x[..., :head_dim].to(query.dtype).contiguous() for x in grads)
    return dq, dk, dv, dpk, dpv, grad_bias[: len(bias)].to(bias.dtype)
