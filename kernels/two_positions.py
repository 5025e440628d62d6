"""Attention with two positions a token: the true one for near keys, a scaled one for far keys.

Under rotary embedding a score depends on the distance of two tokens. Inside the disc of local
attention that distance is below the radius at any size of the image, so that nothing there is
new to the model. Only pairs with a text token (at position 0) or a pooled key lie as far apart as
the image is large: those are scored by positions scaled to the extent the model was trained at.
Self-Extend (arXiv 2401.01325) does so for long texts. Near levels of far keys keep true positions
too: scaled, they would lie among the neighbours and blur the image. The levels between these and
the farthest have positions between (`Window.levels_by_position`): from one level to the next no
distance seems to shrink much, which would draw arcs around things.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from .attention import check_inputs, local_attention
from .dense import dense_attention
from .groups import from_members, group_of, members
from .merge import merge_
from .pooling import pool_cells, pool_tokens
from .window import Window

# Query and key, rotated.
Rotated = tuple[torch.Tensor, torch.Tensor]
KeyValue = tuple[torch.Tensor, torch.Tensor]
# A window and its image queries, key and value of its tokens, key and value of its cells.
Part = tuple[Window, torch.Tensor, KeyValue, KeyValue]


class Scaled(NamedTuple):
    """What rotates query and key by scaled positions, when they are needed: both together are twice
    the size of a layer's tokens.

    Attributes:
        far: by those that lie within the extent the model was trained at.
        between: by positions between the true ones and these, the least scaled first, for levels of
            far keys alone.
    """

    far: Callable[[], Rotated]
    between: Sequence[Callable[[], Rotated]] = ()

    def after(self, change: Callable[[Rotated], Rotated]) -> Scaled:
        """The same, of what a change makes of query and key."""

        def changed(rotate: Callable[[], Rotated]) -> Rotated:
            return change(rotate())

        return Scaled(
            functools.partial(changed, self.far),
            [functools.partial(changed, each) for each in self.between],
        )


# Scores held at once by `full_two_position_attention`.
SCORES = 2**25


def two_position_attention(
    near: Rotated,
    scaled: Scaled,
    value: torch.Tensor,
    window: Window,
    *,
    scale: float | None = None,
    impl: str = "auto",
    **of_pooled: Any,
) -> torch.Tensor:
    """`local_attention` in which far pairs are scored by another query and key.

    Where `near` and all of `scaled` are equal, it is `local_attention`.

    Args:
        near: query and key, (batch, text + image, heads or key heads, head_dim) each, rotated by
            true positions: for pairs of image tokens inside the disc, and for near levels of far
            keys.
        scaled: the same query and key, rotated by scaled positions: for pairs with a text token,
            and for pooled and all other far keys.
        value: of the key's shape.
        window, scale, impl: as in `local_attention`; queries may be all of the image's alone
            (`Window.image_queries`).
        of_pooled: spatial_weight and far_offset, as in `local_attention`.

    Returns:
        The attention output, shape and dtype of the query.

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
    scale = value.shape[-1] ** -0.5 if scale is None else float(scale)
    text = window.text_query_length

    def checked(rotate: Callable[[], Rotated]) -> Rotated:
        query, key = rotate()
        if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
            raise ValueError(
                "two_position_attention: has no gradients; train at the native size, or use "
                "torch.no_grad()."
            )
        learned = of_pooled.get("spatial_weight"), of_pooled.get("far_offset")
        check_inputs(query, key, value, window, *learned)
        return query, key

    if window.far_levels:
        rotated = [
            functools.partial(checked, rotate)
            for rotate in (lambda: near, *scaled.between, scaled.far)
        ]
        image = _image_with_far_keys(rotated, value, window, scale=scale, impl=impl, **of_pooled)
    else:
        near, far = checked(lambda: near), checked(scaled.far)
        image = _image(near, far, value, window, scale=scale, impl=impl, **of_pooled)
    if not text:
        return image.to(value.dtype)
    query, key = scaled.far()
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
    first = window.text_query_length
    image, lse = local_attention(
        near[0][:, first:], near[1][:, text:], value[:, text:], window.image_only,
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
        others = dense_attention(query[:, first:], far_key, far_value, scale=scale, impl=impl)
        merge_(image, lse, *others)
    return image


def _image_with_far_keys(
    rotated: Sequence[Callable[[], Rotated]],
    value: torch.Tensor,
    window: Window,
    *,
    spatial_weight: torch.Tensor | None = None,
    scale: float,
    **options: Any,
) -> torch.Tensor:
    """The image's queries; query and key are rotated position after position."""
    text, between = window.text_length, len(rotated) - 2
    first = window.text_query_length
    levels = window.levels_by_position(between)
    windows = iter(window.parts_by_position(between))

    def parts() -> Iterator[Part]:
        for rotate, own in zip(rotated, levels, strict=True):
            if not own:
                continue
            query, key = rotate()
            image = key[:, text:], value[:, text:]
            apart = text if own is levels[-1] else 0
            tokens = image if own.start == 0 else (key[:, :apart], value[:, :apart])
            cells = _cells(*image, window, own, spatial_weight, scale)
            yield next(windows), query[:, first:], tokens, cells
            del query, key, image, tokens, cells  # before there are others

    return attend_part_by_part(parts(), scale=scale, **options)


def _cells(
    key: torch.Tensor,
    value: torch.Tensor,
    window: Window,
    levels: range,
    spatial_weight: torch.Tensor | None,
    scale: float,
) -> KeyValue:
    """Key and value of the cells of some levels, of which 0 has none."""
    highest = levels.stop - 1
    if highest == 0:
        return key[:, :0], value[:, :0]
    cells = pool_cells(key, value, spatial_weight, window.height, window.width, highest, scale)
    below = sum(window.cells_of_level(level) for level in range(1, levels.start))
    key, value = (each[:, below:] for each in cells)
    return key, value


def attend_part_by_part(
    parts: Iterable[Part],
    *,
    scale: float,
    impl: str,
    far_offset: torch.Tensor | None = None,
) -> torch.Tensor:
    """Image queries under far keys: every part of the keys by a query and keys of its own.

    Args:
        parts: the windows of `Window.parts_by_position`, each with its image queries; key and value
            of its tokens: of the image's that are given, of none, or, in the last, of the text;
            and of its cells that are given.
        scale, impl, far_offset: as in `local_attention`.

    Returns:
        Shape of the query, float32 or wider.
    """
    merged: torch.Tensor | None = None
    for window, query, tokens, cells in parts:
        out, lse = local_attention(
            query, *tokens, window, pooled=cells, return_lse=True,
            far_offset=far_offset, scale=scale, impl=impl,
        )  # fmt: skip
        del query, tokens, cells  # before the next are made
        if merged is None:
            merged, total = out.to(lse.dtype), lse
        else:
            merge_(merged, total, out, lse)
        del out, lse
    assert merged is not None
    return merged


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
            down_factor means nothing here. Queries may be all of the image's alone.

    Returns:
        The attention output, shape and dtype of the query.
    """
    batch, _, heads, head_dim = near[0].shape
    sequence = value.shape[1]
    skipped = window.text_length - window.text_query_length
    group = group_of(near[0], value)
    text, width = window.text_length, window.width
    scale = head_dim**-0.5 if scale is None else float(scale)
    image = torch.arange(window.image_length, device=value.device)
    rows, columns = image // width, image % width
    near_query, near_key, far_query, far_key, values = (
        tensor.transpose(1, 2).to(torch.promote_types(value.dtype, torch.float32))
        for tensor in (*near, *far, value)
    )
    parts = []
    for block in torch.arange(skipped, sequence, device=value.device).split(
        max(1, SCORES // (batch * heads * sequence))
    ):
        scores = _scores(far_query[:, :, block - skipped], far_key, group)
        tokens = block[block >= text] - text
        if len(tokens):
            inside = (rows[tokens, None] - rows) ** 2 + (columns[tokens, None] - columns) ** 2
            queries = near_query[:, :, tokens + text - skipped]
            true_scores = _scores(queries, near_key[:, :, text:], group)
            of_image = scores[:, :, -len(tokens) :, text:]
            of_image.copy_(torch.where(inside < window.disc_radius**2, true_scores, of_image))
        probability = (scores * scale).softmax(dim=-1)
        outs = [of_member @ values for of_member in members(probability, group)]
        parts.append(from_members(outs))
    return torch.cat(parts, dim=2).transpose(1, 2).to(value.dtype)


def _scores(query: torch.Tensor, key: torch.Tensor, group: int) -> torch.Tensor:
    """Products of (batch, heads, queries, head_dim) and (batch, key heads, keys, head_dim)."""
    return from_members([of_member @ key.mT for of_member in members(query, group)])
