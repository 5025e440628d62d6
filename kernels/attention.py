"""`local_attention`: validation, and one way in for all implementations."""

from __future__ import annotations

import torch

from .choice import run_chosen
from .full import full_attention
from .numbers import number
from .reference_images import attention_with_local_references
from .window import Window


def check_inputs(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: Window,
    spatial_weight: torch.Tensor | None,
    far_offset: torch.Tensor | None = None,
    pooled: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Refuse, in one or two lines, inputs that contradict each other or the window.

    Raises:
        ValueError: see the messages.
    """
    if query.ndim != 4:
        raise ValueError(
            "local_attention: query must be (batch, sequence, heads, head_dim), "
            f"got {query.ndim} dimensions {tuple(query.shape)}."
        )
    whole = window.query_rows is None
    key_heads = key.shape[2] if key.ndim == 4 else query.shape[2]
    if not key_heads or query.shape[2] % key_heads:
        raise ValueError(
            "local_attention: query's heads must be a multiple of key's, got "
            f"{query.shape[2]} and {key_heads}."
        )
    length = query.shape[1] if whole else window.key_length
    expected = (query.shape[0], length, key_heads, query.shape[3])
    for name, tensor in (("key", key), ("value", value)):
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f"local_attention: {name} must be (batch, sequence, key heads, head_dim), here "
                f"{expected}, got {tuple(tensor.shape)}."
            )
        for what in ("dtype", "device"):
            if getattr(tensor, what) != getattr(query, what):
                raise ValueError(
                    f"local_attention: {name} must have query's {what} "
                    f"{getattr(query, what)}, got {getattr(tensor, what)}."
                )
    if not query.is_floating_point():
        raise ValueError(f"local_attention: query must be floating point, got {query.dtype}.")
    if query.shape[1] != window.query_length:
        queries = "" if whole else f", of which the rows {window.query_rows} are queries"
        raise ValueError(
            f"local_attention: the sequence has {query.shape[1]} tokens, but the window says "
            f"{window.text_length} text + {window.height} x {window.width} image = "
            f"{window.sequence_length}{queries}."
        )
    _check_pooled(key, window, pooled)
    heads, levels, factor = query.shape[2], window.far_levels, window.down_factor
    if far_offset is not None and (
        not levels
        or far_offset.ndim != 2
        or len(far_offset) < levels
        or far_offset.shape[1] != heads
        or far_offset.device != query.device
    ):
        raise ValueError(
            f"local_attention: far_offset must be ({levels} levels or more, {heads} heads) on "
            f"{query.device} and needs a window with far_levels, got {tuple(far_offset.shape)} on "
            f"{far_offset.device}."
        )
    if spatial_weight is None:
        return
    shape, device = tuple(spatial_weight.shape), spatial_weight.device
    if levels:
        fits, wanted = shape[1:] == (2, 2) and shape[0] >= levels, f"({levels} or more, 2, 2)"
    elif factor > 1:
        shapes = ((factor, factor), (1, 1, 1, factor, 1, factor, 1))
        fits, wanted = shape in shapes, f"{shapes[0]} or {shapes[1]}"
    else:
        raise ValueError(
            "local_attention: spatial_weight needs a window with down_factor > 1 or far_levels."
        )
    if not fits or device != query.device:
        raise ValueError(
            f"local_attention: spatial_weight must have shape {wanted} and be on "
            f"{query.device}, got {shape} on {device}."
        )


def _check_pooled(
    key: torch.Tensor, window: Window, pooled: tuple[torch.Tensor, torch.Tensor] | None
) -> None:
    if pooled is None:
        if window.key_rows is not None and window.far_levels:
            raise ValueError("local_attention: a window with key_rows needs its pooled keys.")
        return
    wanted = (key.shape[0], window.pooled_length, *key.shape[2:])
    for tensor in pooled:
        if tuple(tensor.shape) != wanted or tensor.dtype != key.dtype:
            raise ValueError(
                f"local_attention: pooled key and value must be {wanted}, {key.dtype}, got "
                f"{tuple(tensor.shape)}, {tensor.dtype}."
            )


def local_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: Window,
    *,
    scale: float | None = None,
    spatial_weight: torch.Tensor | None = None,
    far_offset: torch.Tensor | None = None,
    pooled: tuple[torch.Tensor, torch.Tensor] | None = None,
    impl: str = "auto",
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """CLEAR's local attention (arXiv 2412.16112): softmax attention under `Window.mask()`.

    Args:
        q: query: (batch, text + image, heads, head_dim), float16, bfloat16, float32 or float64, any
            strides; text tokens first, image tokens in raster order; QK-norm and RoPE applied. With
            `window.query_rows` the queries are those rows' alone.
        k, v: key, value: (batch, text + image, key heads, head_dim), likewise. Of fewer key heads
            than heads each serves a group of heads (arXiv 2305.13245): query head h reads key head
            h // (heads / key heads), as with `enable_gqa` of PyTorch's attention; no key is
            repeated in memory.
        window: the geometry, in tokens.
        scale: factor on query times key; default head_dim^-0.5.
        spatial_weight: weights of the pooling cell, (1, 1, 1, f, 1, f, 1) or (f, f) with
            f = down_factor, for keys and values alike; default 1 / f^2. With far keys (far_levels
            or more, 2, 2): of a cell's children, level by level; default 1 / 4.
        far_offset: (far_levels or more, heads of q), added to the scores of far keys besides the
            log of the tokens they stand for; default 0.
        pooled: pooled key and value, where they are known or come from elsewhere: (batch,
            window.pooled_length, key heads, head_dim) each. Otherwise they are made of k and v.
        impl: one of `auto, triton, flex, tiled, reference`. "auto" takes the first of `preference`
            that can run, and PyTorch's own attention where the window `sees_everything`; an
            explicit choice never falls back.
        return_lse: return the log-sum-exp of the scaled scores too.

    Returns:
        The attention output, shape and dtype of `q`; with `return_lse` also the natural-log
        log-sum-exp, float32 (float64 for float64 inputs), (batch, text + image, heads), which is
        for merging with other keys and carries no gradient.

    Raises:
        ValueError: shapes, dtypes or devices that differ, a sequence that contradicts the window,
            an unknown `impl`, an explicit `impl` that cannot run here, or gradients with
            `window.query_rows` or `window.local_references`, which have no backward pass.
    """
    check_inputs(q, k, v, window, spatial_weight, far_offset, pooled)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    elif not isinstance(scale, float):  # which torch.compile may keep symbolic
        scale = number("local_attention: scale", scale)
    needs_grad = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad
        for x in (q, k, v, spatial_weight, far_offset, *(pooled or ()))
    )
    if needs_grad and window.query_rows is not None:
        raise ValueError(
            "local_attention: a window with query_rows has no backward pass; use torch.no_grad()."
        )
    if needs_grad and window.local_references:
        raise ValueError(
            "local_attention: reference images that are local within themselves have no backward "
            "pass; use torch.no_grad(), or references='dense'."
        )
    if window.sees_everything and impl == "auto" and not return_lse:
        return full_attention(q, k, v, scale=scale)
    of_pooled = {"spatial_weight": spatial_weight, "far_offset": far_offset, "pooled": pooled}
    if window.local_references and impl != "reference":
        out, lse = attention_with_local_references(
            q, k, v, window, scale=scale, impl=impl, **of_pooled
        )
        return (out, lse) if return_lse else out
    out, lse = run_chosen(
        impl, q, k, v, window,
        scale=scale, needs_grad=needs_grad, return_lse=return_lse, **of_pooled,
    )  # fmt: skip
    return (out, lse.detach()) if return_lse else out
