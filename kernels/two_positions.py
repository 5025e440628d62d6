"""Attention with two positions a token: the true one for near keys, a scaled one for far keys.

Under rotary embedding a score depends on the distance of two tokens. Inside the disc of local
attention that distance is below the radius at any size of the image, so that nothing there is
new to the model. Only pairs with a text token (at position 0) or a pooled key lie as far apart as
the image is large: those are scored by positions scaled to the extent the model was trained at.
Self-Extend (arXiv 2401.01325) does so for long texts. Near levels of far keys keep true positions
too (`Window.near_levels`): scaled, they would lie among the neighbours and blur the image.
"""

from __future__ import annotations

from typing import Any

import torch

from .attention import check_inputs, local_attention
from .dense import dense_attention
from .merge import merge_
from .pooling import pool_cells, pool_tokens, pooled_keys
from .window import Window

# Query and key, rotated.
Rotated = tuple[torch.Tensor, torch.Tensor]

# Scores held at once by `full_two_position_attention`.
SCORES = 2**25


def two_position_attention(
    near: Rotated,
    far: Rotated,
    value: torch.Tensor,
    window: Window,
    *,
    scale: float | None = None,
    impl: str = "auto",
    **of_pooled: Any,
) -> torch.Tensor:
    """`local_attention` in which far pairs are scored by another query and key.

    Where `near` and `far` are equal, it is `local_attention`.

    Args:
        near: query and key, (batch, text + image, heads, head_dim) each, rotated by true positions:
            for pairs of image tokens inside the disc, and for far keys of `Window.near_levels`.
        far: the same query and key, rotated by scaled positions: for pairs with a text token, and
            for pooled and all other far keys.
        value: of the same shape.
        window, scale, impl: as in `local_attention`.
        of_pooled: spatial_weight and far_offset, as in `local_attention`.

    Returns:
        The attention output, shape and dtype of `value`.

    Raises:
        ValueError: gradients are asked for, which no merged part carries; a window with
            `local_references` or pooled keys that count; what `local_attention` refuses.
    """
    if window.local_references:
        raise ValueError(
            "two_position_attention: reference images that are local within themselves do not go "
            "with two positions a token; use references='dense', or rope \"yarn\"."
        )
    if window.pooled_weight == "count":
        raise ValueError(
            'two_position_attention: pooled_weight="count" does not go with two positions a token; '
            'use rope "yarn".'
        )
    tensors = (*near, *far, value)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise ValueError(
            "two_position_attention: has no gradients; train at the native size, or use "
            "torch.no_grad()."
        )
    learned = of_pooled.get("spatial_weight"), of_pooled.get("far_offset")
    for query, key in (near, far):
        check_inputs(query, key, value, window, *learned)
    scale = value.shape[-1] ** -0.5 if scale is None else float(scale)
    text = window.text_length
    if window.far_levels:
        image = _image_with_far_keys(near, far, value, window, scale=scale, impl=impl, **of_pooled)
    else:
        image = _image(near, far, value, window, scale=scale, impl=impl, **of_pooled)
    if not text:
        return image.to(value.dtype)
    text_out, _ = dense_attention(query[:, :text], key, value, scale=scale, impl=impl)
    return torch.cat([text_out.to(value.dtype), image.to(value.dtype)], dim=1)


def _image(
    near: Rotated,
    far: Rotated,
    value: torch.Tensor,
    window: Window,
    *,
    scale: float,
    impl: str,
    spatial_weight: torch.Tensor | None = None,
    far_offset: torch.Tensor | None = None,
) -> torch.Tensor:
    """The image's queries, whose disc is scored by `near`."""
    text, (query, key) = window.text_length, far
    image, lse = local_attention(
        near[0][:, text:], near[1][:, text:], value[:, text:], window.image_only,
        scale=scale, impl=impl, return_lse=True,
    )  # fmt: skip
    far_key, far_value = key[:, :text], value[:, :text]
    if window.down_factor > 1:
        far_key, far_value = (
            torch.cat([part, pool_tokens(whole, window, spatial_weight)], dim=1)
            for part, whole in ((far_key, key), (far_value, value))
        )
    if far_key.shape[1]:
        image = image.to(lse.dtype)
        others = dense_attention(query[:, text:], far_key, far_value, scale=scale, impl=impl)
        merge_(image, lse, *others)
    return image


def _image_with_far_keys(
    near: Rotated,
    far: Rotated,
    value: torch.Tensor,
    window: Window,
    *,
    scale: float,
    spatial_weight: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """The image's queries, whose near tokens and cells are scored by `near`."""
    text, (query, key) = window.text_length, far
    pooled = pooled_keys(key, value, window, spatial_weight, scale)
    if window.near_levels:
        sizes = window.height, window.width, window.near_levels
        near_cells = pool_cells(near[1][:, text:], value[:, text:], spatial_weight, *sizes, scale)
        for cells, of_near in zip(pooled, near_cells, strict=True):
            cells[:, : of_near.shape[1]] = of_near
    return attend_near_and_far(
        near[0][:, text:], (near[1][:, text:], value[:, text:]),
        query[:, text:], (key[:, :text], value[:, :text]),
        pooled, window, scale=scale, **options,
    )  # fmt: skip


def attend_near_and_far(
    near_query: torch.Tensor,
    tokens: tuple[torch.Tensor, torch.Tensor],
    far_query: torch.Tensor,
    text: tuple[torch.Tensor, torch.Tensor],
    cells: tuple[torch.Tensor, torch.Tensor],
    window: Window,
    *,
    scale: float,
    impl: str,
    far_offset: torch.Tensor | None = None,
) -> torch.Tensor:
    """Image queries under far keys: near tokens and cells by one query, all else by another.

    Args:
        near_query, far_query: (batch, queries, heads, head_dim), the window's image queries.
        tokens: key and value of the image's tokens that are given, rotated as `near_query`.
        text: the same of the text, as `far_query`.
        cells: the same of the cells that are given: of `Window.near_levels` as `near_query`.
        window: with far keys.
        scale, impl, far_offset: as in `local_attention`.

    Returns:
        Shape of the query, float32 or wider.
    """
    options: dict[str, Any] = {"far_offset": far_offset, "scale": scale, "impl": impl}
    near_part, far_part = window.near_part, window.far_part
    near_cells, far_cells = zip(
        *(x.split([near_part.pooled_length, far_part.pooled_length], dim=1) for x in cells),
        strict=True,
    )
    image, lse = local_attention(
        near_query, *tokens, near_part, pooled=near_cells, return_lse=True, **options
    )
    others = local_attention(
        far_query, *text, far_part, pooled=far_cells, return_lse=True, **options
    )
    image = image.to(lse.dtype)
    merge_(image, lse, *others)
    return image


def full_two_position_attention(
    near: Rotated,
    far: Rotated,
    value: torch.Tensor,
    window: Window,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """Full attention, in which the window says which pairs of image tokens are near.

    For images of the size a model was trained at, but of another shape: quadratic time, and
    memory for a block of queries at a time.

    Args:
        near, far, value, scale: as in `two_position_attention`.
        window: the grid, and the radius in tokens inside which pairs are scored by `near`; its
            down_factor means nothing here.

    Returns:
        The attention output, shape and dtype of `value`.
    """
    batch, sequence, heads, head_dim = value.shape
    text, width = window.text_length, window.width
    scale = head_dim**-0.5 if scale is None else float(scale)
    image = torch.arange(window.image_length, device=value.device)
    rows, columns = image // width, image % width
    near_query, near_key, far_query, far_key, values = (
        tensor.transpose(1, 2).to(torch.promote_types(value.dtype, torch.float32))
        for tensor in (*near, *far, value)
    )
    parts = []
    for block in torch.arange(sequence, device=value.device).split(
        max(1, SCORES // (batch * heads * sequence))
    ):
        scores = far_query[:, :, block] @ far_key.mT
        tokens = block[block >= text] - text
        if len(tokens):
            inside = (rows[tokens, None] - rows) ** 2 + (columns[tokens, None] - columns) ** 2
            true_scores = near_query[:, :, tokens + text] @ near_key[:, :, text:].mT
            of_image = scores[:, :, -len(tokens) :, text:]
            of_image.copy_(torch.where(inside < window.disc_radius**2, true_scores, of_image))
        parts.append((scores * scale).softmax(dim=-1) @ values)
    return torch.cat(parts, dim=2).transpose(1, 2).to(value.dtype)
