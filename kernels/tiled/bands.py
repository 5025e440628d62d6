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
from collections.abc import Iterator

import torch

from ..merge import merge_
from ..opaque import attention_op, channels_contiguous, run_attention_op
from ..window import Window
from .native import forward
from .native.forward import attend_compiled, why_not_compiled
from .partial import attend, attend_backward, compute_dtype
from .tiles import (
    MASK_ELEMENTS,
    TILE_COLUMNS,
    Band,
    Columns,
    bands,
    executed_tile_pairs,
    tile_bias,
    tile_columns,
)

logger = logging.getLogger(__name__)

# Keys that the text queries attend to at a time.
TEXT_STRETCH = 4096

# Below: W columns, Y rows of a band, K rows of its keys, H heads, D head_dim.


def tiled_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: Window,
    *,
    scale: float,
    spatial_weight: torch.Tensor | None = None,
    return_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tiled CLEAR attention; arguments are those of `local_attention`.

    Returns:
        (out, lse), whether or not `return_lse` asks for both. Only `out` carries gradients.
    """
    return run_attention_op(_op, query, key, value, window, scale, spatial_weight)


def executed_pairs(query: torch.Tensor, window: Window) -> int:
    """(query, key) pairs computed for a head, masked ones too; see `attended_pairs`."""
    if why_not_compiled(query, window.height, window.width) is not None:
        return executed_tile_pairs(window)
    return forward.executed_pairs(window, query.shape[-1])


class _Masks:
    """Groups of tiles of one band with their masks, kept while the next bands look the same."""

    def __init__(
        self, columns: Columns, radius: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._columns = columns
        self._make = lambda band, tiles: tile_bias(band, columns, tiles, radius, dtype, device)
        self._shape: tuple[int, int, int] | None = None
        self._only: torch.Tensor | None = None

    def __call__(self, band: Band) -> Iterator[tuple[range, torch.Tensor | None]]:
        """(tiles, mask) one after the other; a large mask is made anew instead of being kept."""
        rows, _, key_rows = band.shape
        elements = rows * TILE_COLUMNS * key_rows * self._columns.key_length
        count, group = self._columns.count, max(1, MASK_ELEMENTS // elements)
        if group < count:
            for start in range(0, count, group):
                tiles = range(start, min(start + group, count))
                yield tiles, self._make(band, tiles)
            return
        if band.shape != self._shape:
            self._shape, self._only = band.shape, self._make(band, range(count))
        yield range(count), self._only


def _heads_first(tokens: torch.Tensor) -> torch.Tensor:
    """(tokens, H, D) -> (1, H, tokens, D), a view."""
    return tokens.transpose(0, 1).unsqueeze(0)


def _tokens_first(part: torch.Tensor) -> torch.Tensor:
    """(1, H, tokens, ...) -> (tokens, H, ...), a view."""
    return part.squeeze(0).transpose(0, 1)


def _column_major(
    image: torch.Tensor,
    width: int,
    rows: slice,
    dtype: torch.dtype,
    columns: int,
    padding: int = 0,
) -> torch.Tensor:
    """Rows of a raster-order image (tokens, ...) as a copy (columns, rows, ...), zero beyond it."""
    raster = image[rows.start * width : rows.stop * width].unflatten(0, (-1, width))
    make = torch.empty if columns == width else torch.zeros
    band = make(columns, len(raster), *raster.shape[2:], dtype=dtype, device=image.device)
    band[padding : padding + width] = raster.transpose(0, 1)
    return band


def _query_tiles(band: torch.Tensor, tiles: range) -> torch.Tensor:
    """Queries of some tiles: (W, Y, H, ...) -> (tiles, H, tile tokens, ...), a view."""
    part = band[tiles.start * TILE_COLUMNS : tiles.stop * TILE_COLUMNS]
    return part.reshape(len(tiles), -1, *band.shape[2:]).transpose(1, 2)


def _key_tiles(band: torch.Tensor, columns: Columns, tiles: range) -> torch.Tensor:
    """Keys of some tiles: (W, K, H, D) -> (tiles, H, key tokens, D), overlapping views."""
    _, rows, heads, head_dim = band.shape
    token = heads * head_dim
    step = columns.stride * rows * token
    return band.as_strided(
        (len(tiles), heads, columns.key_length * rows, head_dim),
        (step, head_dim, token, 1),
        band.storage_offset() + tiles.start * step,
    )


def _add_key_tiles(band: torch.Tensor, columns: Columns, tiles: range, grad: torch.Tensor) -> None:
    """Adjoint of `_key_tiles`: add (tiles, H, key tokens, D) where they overlap."""
    for tile, part in zip(tiles, grad, strict=True):
        start = tile * columns.stride
        target = band[start : start + columns.key_length]
        target += part.transpose(0, 1).reshape(target.shape)


def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pooled_key: torch.Tensor,
    pooled_value: torch.Tensor,
    height: int,
    width: int,
    text_length: int,
    radius: int,
    scale: float,
    query_start: int,
    query_stop: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    query, key, value = channels_contiguous(query, key, value)
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = torch.empty(query.shape[:-1], dtype=lse_dtype, device=query.device)
    dense_key, dense_value = (
        torch.cat([x[:, :text_length], pooled.to(x.dtype)], dim=1)
        for x, pooled in ((key, pooled_key), (value, pooled_value))
    )
    why_not = why_not_compiled(query, height, width)
    _announce(why_not)
    run = attend_compiled if why_not is None else _attend_in_bands
    run(
        query, key, value, dense_key, dense_value, out, lse,
        height, width, text_length, radius, scale, query_start, query_stop,
    )  # fmt: skip
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
    dense_key: torch.Tensor,
    dense_value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    height: int,
    width: int,
    text_length: int,
    radius: int,
    scale: float,
    query_start: int,
    query_stop: int,
) -> None:
    """`attend_compiled` by PyTorch's operators, on any device and in any dtype."""
    text_queries = query.shape[1] - (query_stop - query_start) * width
    if text_queries:
        text = slice(None, text_queries)
        _attend_text_queries(query[:, text], key, value, out[:, text], lse[:, text], scale)
    query, out, lse = (x[:, text_queries:] for x in (query, out, lse))
    key, value = key[:, text_length:], value[:, text_length:]
    dtype = compute_dtype(query.dtype, query.device)
    columns = tile_columns(width, radius)
    masks = _Masks(columns, radius, dtype, query.device)
    key_columns = {"columns": columns.key_width, "padding": columns.padding}
    dense_key, dense_value = (x.transpose(1, 2).to(dtype) for x in (dense_key, dense_value))

    for item in range(query.shape[0]):
        q, k, v = query[item], key[item], value[item]
        dense = (dense_key[item : item + 1], dense_value[item : item + 1])
        for band in bands(height, radius, range(query_start, query_stop)):
            reach = slice(band.key_start, band.key_stop)
            own = slice(band.start - query_start, band.stop - query_start)  # rows of queries
            q_band = _column_major(q, width, own, dtype, columns.query_width)
            k_band = _column_major(k, width, reach, dtype, **key_columns)
            v_band = _column_major(v, width, reach, dtype, **key_columns)
            if dense_key.shape[2]:
                parts = attend(_heads_first(q_band.flatten(0, 1)), *dense, scale)
                band_out, band_lse = (
                    _tokens_first(part).contiguous().unflatten(0, q_band.shape[:2])
                    for part in parts
                )
            else:
                band_out = torch.zeros_like(q_band, dtype=lse.dtype)
                band_lse = torch.full_like(band_out[..., 0], float("-inf"))
            for tiles, mask in masks(band):
                parts = attend(
                    _query_tiles(q_band, tiles),
                    _key_tiles(k_band, columns, tiles),
                    _key_tiles(v_band, columns, tiles),
                    scale,
                    mask,
                )
                merge_(_query_tiles(band_out, tiles), _query_tiles(band_lse, tiles), *parts)
            for whole, part in ((out, band_out), (lse, band_lse)):
                target = whole[item, own.start * width : own.stop * width]
                target.unflatten(0, (-1, width)).copy_(part[:width].transpose(0, 1))


def _attend_text_queries(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> None:
    """Attention to all text and image keys into `out` and `lse`; (batch, tokens, heads, ...)."""
    dtype = compute_dtype(query.dtype, query.device)
    query = query.transpose(1, 2).to(dtype)
    key, value = key.transpose(1, 2), value.transpose(1, 2)
    parts = (
        attend(query, some_key.to(dtype), some_value.to(dtype), scale)
        for some_key, some_value in zip(
            key.split(TEXT_STRETCH, 2), value.split(TEXT_STRETCH, 2), strict=True
        )
    )
    text_out, text_lse = next(parts)
    for part in parts:
        merge_(text_out, text_lse, *part)
    out.copy_(text_out.transpose(1, 2))
    lse.copy_(text_lse.transpose(1, 2))


def _backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pooled_key: torch.Tensor,
    pooled_value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    height: int,
    width: int,
    text_length: int,
    radius: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    grad, query, key, value = channels_contiguous(grad, query, key, value)
    pooled_key, pooled_value = channels_contiguous(pooled_key, pooled_value)
    dtype = compute_dtype(query.dtype, query.device)
    sum_dtype = torch.promote_types(dtype, torch.float32)
    grads = [
        torch.zeros(tensor.shape, dtype=sum_dtype, device=tensor.device)
        for tensor in (query, key, value, pooled_key, pooled_value)
    ]
    columns = tile_columns(width, radius)
    masks = _Masks(columns, radius, dtype, query.device)
    key_columns = {"columns": columns.key_width, "padding": columns.padding}

    for item in range(query.shape[0]):
        text = [x[item, :text_length].to(dtype) for x in (query, key, value, grad, out)]
        q, k, v, g, o = (x[item, text_length:] for x in (query, key, value, grad, out))
        image_lse = lse[item, text_length:]
        text_lse = _heads_first(lse[item, :text_length]).contiguous()
        all_key, all_value = (
            _heads_first(torch.cat([part, pooled[item].to(dtype)]))
            for part, pooled in ((text[1], pooled_key), (text[2], pooled_value))
        )
        text_query, text_key, text_value, text_grad, text_out = (_heads_first(x) for x in text)
        grad_all_key = torch.zeros_like(all_key, dtype=sum_dtype)
        grad_all_value = torch.zeros_like(all_value, dtype=sum_dtype)
        grad_q, grad_k, grad_v = (x[item, text_length:] for x in grads[:3])
        grad_text = grads[0][item, :text_length]

        if text_length:
            parts = attend_backward(
                text_grad, text_query, text_key, text_value, text_out, text_lse, scale
            )
            grad_text += _tokens_first(parts[0])
            grad_all_key[:, :, :text_length] += parts[1]
            grad_all_value[:, :, :text_length] += parts[2]

        for band in bands(height, radius):
            own, reach = slice(band.start, band.stop), slice(band.key_start, band.key_stop)
            own_tokens = slice(own.start * width, own.stop * width)
            if text_length:
                band_key, band_value = (_heads_first(x[own_tokens].to(dtype)) for x in (k, v))
                parts = attend_backward(
                    text_grad, text_query, band_key, band_value, text_out, text_lse, scale
                )
                grad_text += _tokens_first(parts[0])
                grad_k[own_tokens] += _tokens_first(parts[1])
                grad_v[own_tokens] += _tokens_first(parts[2])

            q_band, g_band, o_band = (
                _column_major(x, width, own, dtype, columns.query_width) for x in (q, g, o)
            )
            l_band = _column_major(image_lse, width, own, lse.dtype, columns.query_width)
            k_band = _column_major(k, width, reach, dtype, **key_columns)
            v_band = _column_major(v, width, reach, dtype, **key_columns)
            grad_q_band = torch.zeros_like(q_band, dtype=sum_dtype)
            grad_k_band = torch.zeros_like(k_band, dtype=sum_dtype)
            grad_v_band = torch.zeros_like(v_band, dtype=sum_dtype)
            for tiles, mask in masks(band):
                parts = attend_backward(
                    _query_tiles(g_band, tiles),
                    _query_tiles(q_band, tiles),
                    _key_tiles(k_band, columns, tiles),
                    _key_tiles(v_band, columns, tiles),
                    _query_tiles(o_band, tiles),
                    _query_tiles(l_band, tiles).contiguous(),
                    scale,
                    mask,
                )
                _query_tiles(grad_q_band, tiles).copy_(parts[0])
                _add_key_tiles(grad_k_band, columns, tiles, parts[1])
                _add_key_tiles(grad_v_band, columns, tiles, parts[2])
            if all_key.shape[2]:
                parts = attend_backward(
                    _heads_first(g_band.flatten(0, 1)),
                    _heads_first(q_band.flatten(0, 1)),
                    all_key,
                    all_value,
                    _heads_first(o_band.flatten(0, 1)),
                    _heads_first(l_band.flatten(0, 1)).contiguous(),
                    scale,
                )
                grad_q_band += _tokens_first(parts[0]).view_as(grad_q_band)
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
            whole[item, :text_length] += _tokens_first(part)[:text_length]
            pooled[item] = _tokens_first(part)[text_length:]
    dq, dk, dv, dpk, dpv = (x.to(query.dtype) for x in grads)
    return dq, dk, dv, dpk, dpv


_op = attention_op("tiled", _forward, _backward)
