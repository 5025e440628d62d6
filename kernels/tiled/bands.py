"""CLEAR attention by two-dimensional tiles: linear memory, forward and backward, on any device.

Forward on a CPU with a C++ compiler it is the compiled kernel of `native/`. Everywhere else, and
backward, it is one loop over bands of TILE_ROWS rows: in a band, image queries attend to the text
and pooled keys (no mask), then tile by tile to the rectangle of image keys around the tile (one
additive mask for all bands that look alike); the parts are merged by log-sum-exp. The whole is an
opaque custom op, so that it works under FakeTensor, torch.compile and FlopCounterMode.
"""

from __future__ import annotations

import functools
import logging

import torch

from ..merge import merge_
from ..opaque import Attention, Geometry, attention_op, channels_contiguous
from ..window import Window
from .backward import backward_in_bands
from .lists import executed_tile_pairs, keys_of_tiles
from .native import forward
from .native.forward import attend_compiled, why_not_compiled
from .partial import attend, attend_all, compute_dtype
from .tiles import bands, tile_columns
from .views import (
    column_major,
    dense_bias,
    dense_keys,
    heads_first,
    query_tiles,
    tokens_first,
)

logger: logging.Logger = logging.getLogger(__name__)


def executed_pairs(query: torch.Tensor, window: Window) -> int:
    """(query, key) pairs computed for a head, masked ones too; see `attended_pairs`."""
    if why_not_compiled(query, window.height, window.width) is not None:
        return executed_tile_pairs(window)
    return forward.executed_pairs(window, query.shape[-1])


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
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = torch.empty(query.shape[:-1], dtype=lse_dtype, device=query.device)
    why_not = why_not_compiled(query, geometry.height, geometry.width)
    _announce(why_not)
    run = attend_compiled if why_not is None else _attend_in_bands
    run(query, key, value, pooled_key, pooled_value, bias, out, lse, geometry)
    return out, lse


@functools.cache
def _announce(why_not: str | None) -> None:
    if why_not is None:
        logger.info("tiled attention runs on the kernel compiled for this CPU")
    else:
        logger.info("tiled attention runs on PyTorch's operators; the compiled one %s", why_not)


def _attend_in_bands(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pooled_key: torch.Tensor,
    pooled_value: torch.Tensor,
    bias: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    geometry: Geometry,
) -> None:
    """What `attention_op` asks for, into `out` and `lse`, on any device and in any dtype."""
    height, width, text_length, radius, scale, query_start, query_stop, *_ = geometry
    text_queries = query.shape[1] - geometry.image_queries
    dense_key, dense_value = (
        dense_keys(*pair, geometry).transpose(1, 2)
        for pair in ((key, pooled_key), (value, pooled_value))
    )
    if text_queries:
        parts = attend_all(query[:, :text_queries], key, value, scale)
        for whole, part in zip((out, lse), parts, strict=True):
            whole[:, :text_queries] = part
    query, out, lse = (x[:, text_queries:] for x in (query, out, lse))
    key, value = key[:, text_length:], value[:, text_length:]
    dtype = compute_dtype(query.dtype, query.device)
    dense_key, dense_value = dense_key.to(dtype), dense_value.to(dtype)
    dense_mask = dense_bias(bias, geometry, lse.dtype)
    keys = keys_of_tiles(geometry, bias, key.shape[2:].numel(), lse.dtype)
    query_width = tile_columns(width, radius).query_width

    for band in bands(height, radius, range(query_start, query_stop)):
        own = slice(band.start - query_start, band.stop - query_start)  # rows of queries
        for item in range(query.shape[0]):
            q, k, v = query[item], key[item], value[item]
            dense = (dense_key[item : item + 1], dense_value[item : item + 1])
            q_band = column_major(q, width, own, dtype, query_width)
            k_band = keys.copy(k, pooled_key[item], band, dtype)
            v_band = keys.copy(v, pooled_value[item], band, dtype)
            if dense_key.shape[2]:
                parts = attend(heads_first(q_band.flatten(0, 1)), *dense, scale, dense_mask)
                band_out, band_lse = (
                    tokens_first(part).contiguous().unflatten(0, q_band.shape[:2]) for part in parts
                )
            else:
                band_out = torch.zeros_like(q_band, dtype=lse.dtype)
                band_lse = torch.full_like(band_out[..., 0], float("-inf"))
            for group in keys.groups(band):
                parts = attend(
                    query_tiles(q_band, group.tiles),
                    keys.take(k_band, group),
                    keys.take(v_band, group),
                    scale,
                    group.mask,
                )
                tile_out, tile_lse = (query_tiles(x, group.tiles) for x in (band_out, band_lse))
                merge_(tile_out, tile_lse, *parts)
            for whole, part in ((out, band_out), (lse, band_lse)):
                target = whole[item, own.start * width : own.stop * width]
                target.unflatten(0, (-1, width)).copy_(part[:width].transpose(0, 1))


tiled_attention: Attention = attention_op("tiled", _forward, backward_in_bands)
