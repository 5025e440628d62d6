"""The backward pass of attention band by band, by PyTorch's operators."""

from __future__ import annotations

import torch

from ..groups import group_of
from ..opaque import Geometry, Gradients, channels_contiguous
from .lists import keys_of_tiles
from .partial import KEYS, attend_backward, compute_dtype
from .tiles import bands, tile_columns
from .views import column_major, dense_bias, dense_keys, heads_first, query_tiles, tokens_first


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
    one of zeros. Every query that reads a key has a bias of its own: of a group each gets its one
    in another channel.
    """
    height, width, text_length, radius, scale, *_ = geometry
    grad, query, key, value = channels_contiguous(grad, query, key, value)
    pooled_key, pooled_value = channels_contiguous(pooled_key, pooled_value)
    dtype = compute_dtype(query.dtype, query.device)
    sum_dtype = torch.promote_types(dtype, torch.float32)
    head_dim, per_key = query.shape[-1], group_of(query, key)
    more = per_key if len(bias) else 0
    grads = [
        torch.zeros(*x.shape[:-1], head_dim + more, dtype=sum_dtype, device=x.device)
        for x in (query, key, value, pooled_key, pooled_value)
    ]
    keys = keys_of_tiles(geometry, bias, grads[1].shape[2:].numel(), sum_dtype)
    query_width = tile_columns(width, radius).query_width
    dense_mask = dense_bias(bias, geometry, sum_dtype)
    ones = torch.eye(per_key, more, dtype=dtype, device=query.device)

    def wide(tokens: torch.Tensor) -> torch.Tensor:
        if not more:
            return tokens
        more_channels = tokens.new_zeros(*tokens.shape[:-1], head_dim + more)
        more_channels[..., :head_dim] = tokens
        return more_channels

    text = [x[:, :text_length].transpose(1, 2).to(dtype) for x in (grad, query, out)]
    text_lse = lse[:, :text_length].transpose(1, 2)
    for start in range(0, key.shape[1] if text_length else 0, KEYS):
        block = slice(start, start + KEYS)
        block_key, block_value = (x[:, block].transpose(1, 2).to(dtype) for x in (key, value))
        parts = attend_backward(text[0], text[1], block_key, block_value, text[2], text_lse, scale)
        for whole, part in zip(grads, parts, strict=False):
            rows = slice(text_length) if whole is grads[0] else block
            whole[:, rows, :, :head_dim] += part.transpose(1, 2)

    dense_key, dense_value = (
        wide(dense_keys(*pair, geometry).to(dtype)).transpose(1, 2)
        for pair in ((key, pooled_key), (value, pooled_value))
    )
    grad_dense_key = torch.zeros_like(dense_key, dtype=sum_dtype)
    grad_dense_value = torch.zeros_like(dense_value, dtype=sum_dtype)
    q, k, v, g, o, of_lse = (x[:, text_length:] for x in (query, key, value, grad, out, lse))
    grad_q, grad_k, grad_v = (x[:, text_length:] for x in grads[:3])
    grad_pooled_key, grad_pooled_value = grads[3:]
    for band in bands(height, radius):
        own = slice(band.start, band.stop)
        for item in range(query.shape[0]):
            q_band, g_band, o_band = (
                wide(column_major(x[item], width, own, dtype, query_width)) for x in (q, g, o)
            )
            q_band.unflatten(-2, (-1, per_key))[..., head_dim:] = ones
            l_band = column_major(of_lse[item], width, own, lse.dtype, query_width)
            k_band = wide(keys.copy(k[item], pooled_key[item], band, dtype))
            v_band = wide(keys.copy(v[item], pooled_value[item], band, dtype))
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
                    query_tiles(l_band, tiles),
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
                    dense_key[item : item + 1],
                    dense_value[item : item + 1],
                    heads_first(o_band.flatten(0, 1)),
                    heads_first(l_band.flatten(0, 1)),
                    scale,
                    dense_mask,
                )
                grad_q_band += tokens_first(parts[0]).view_as(grad_q_band)
                grad_dense_key[item] += parts[1][0]
                grad_dense_value[item] += parts[2][0]
            target = grad_q[item, own.start * width : own.stop * width].unflatten(0, (-1, width))
            target.copy_(grad_q_band[:width].transpose(0, 1))
            keys.add_copy(grad_k[item], grad_pooled_key[item], band, grad_k_band)
            keys.add_copy(grad_v[item], grad_pooled_value[item], band, grad_v_band)

    for whole, pooled, part in (
        (grads[1], grad_pooled_key, grad_dense_key.transpose(1, 2)),
        (grads[2], grad_pooled_value, grad_dense_value.transpose(1, 2)),
    ):
        whole[:, :text_length] += part[:, :text_length]
        if not geometry.far_levels:
            pooled += part[:, text_length:]
    grad_bias = (grad_pooled_key[..., head_dim:].sum(0) / scale).reshape(bias.shape)
    dq, dk, dv, dpk, dpv = (x[..., :head_dim].to(query.dtype).contiguous() for x in grads)
    return dq, dk, dv, dpk, dpv, grad_bias.to(bias.dtype)
