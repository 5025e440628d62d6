"""Attention where reference images are local within themselves, linear in the tokens of each too.

Reference images (FLUX.1-Kontext, FLUX.2, Qwen-Image-Edit) stand beside the image in the sequence
and by default are treated as text is, which makes their own part quadratic. CLEAR has no word on
them (arXiv 2412.16112); here each may get the image's disc, on its own grid.
"""

from __future__ import annotations

from typing import Any

import torch

from .choice import run_chosen
from .dense import dense_attention
from .merge import merge_
from .window import Window

# Output and log-sum-exp.
Attended = tuple[torch.Tensor, torch.Tensor]


def attention_with_local_references(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: Window,
    *,
    scale: float,
    impl: str = "auto",
    **of_pooled: Any,
) -> Attended:
    """`local_attention` for a window with `local_references`; no mask over queries and keys.

    Text is dense attention; the image is local attention over all keys, pooled ones included. A
    reference image is local attention within itself, merged with dense attention over all other
    keys. It sees no pooled keys, as text does not, and has none of its own: what lies outside its
    discs reaches it by way of text and image, which it sees in full.

    Args:
        query, key, value, window, scale, impl: as in `local_attention`; checked.
        of_pooled: spatial_weight, far_offset and pooled, as in `local_attention`.

    Returns:
        (out, lse) of all queries, as `local_attention` with `return_lse`. Neither has gradients.

    Raises:
        ValueError: an explicit `impl` that cannot run here, or cannot return the log-sum-exp.
    """

    def local(own: slice, keys: slice, part: Window, **of_pooled: Any) -> Attended:
        return run_chosen(
            impl, query[:, own], key[:, keys], value[:, keys], part,
            scale=scale, return_lse=True, **of_pooled,
        )  # fmt: skip

    def dense(own: slice, keys: slice) -> Attended:
        return dense_attention(query[:, own], key[:, keys], value[:, keys], scale=scale, impl=impl)

    everything = slice(None)
    start = window.references_start
    parts = [dense(slice(0, start), everything)] if start else []
    for disc in window.reference_windows:
        own = slice(start, start + disc.image_length)
        out, lse = local(own, own, disc)
        out = out.to(lse.dtype)
        if start:
            merge_(out, lse, *dense(own, slice(0, start)))
        merge_(out, lse, *dense(own, slice(own.stop, None)))  # the image, if nothing else
        parts.append((out, lse))
        start = own.stop
    image = slice(window.text_length, None)
    parts.append(local(image, everything, window.image_queries, **of_pooled))
    outs, lses = zip(*parts, strict=True)
    return torch.cat([out.to(query.dtype) for out in outs], dim=1), torch.cat(lses, dim=1)
