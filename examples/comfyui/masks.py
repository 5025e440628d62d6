"""Masks of ComfyUI's attention: which of them only hide padded text."""

from __future__ import annotations

import torch

from clear_dit.attention.layout import Layout
from clear_dit.attention.text_padding import ValidText, valid_text

# Additive masks say "hidden" by numbers like this or less.
HIDDEN = -1e4


class CannotHonourError(Exception):
    """A mask that says more than which text is padding."""


def visible_text(mask: torch.Tensor | None, batch: int, layout: Layout) -> ValidText | None:
    """The places of text that is no padding; None where all of it is none.

    Args:
        mask: as `scaled_dot_product_attention` takes it: bool or additive, (queries, keys),
            (batch, queries, keys) or (batch, heads, queries, keys).
        batch: number of samples.
        layout: text first.

    Raises:
        CannotHonourError: the mask differs by query or head, hides image tokens, or weighs tokens.
    """
    if mask is None:
        return None
    while mask.ndim < 4:
        mask = mask.unsqueeze(0 if mask.ndim == 2 else 1)
    if mask.shape[0] not in (1, batch) or mask.shape[1:] != (1, 1, layout.sequence_length):
        raise CannotHonourError
    keys = mask[:, 0, 0].expand(batch, -1)
    visible = keys if keys.dtype == torch.bool else keys == 0
    weighs = keys.dtype != torch.bool and not bool((visible | (keys <= HIDDEN)).all())
    if weighs or not bool(visible[:, layout.text_length :].all()):
        raise CannotHonourError
    return valid_text(visible[:, : layout.text_length])
