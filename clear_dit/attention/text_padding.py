"""Prompts of different lengths in one batch, without a mask over queries and keys.

Padding that no row of the batch uses is cut off before the model sees it. What is left is kept as
the places of every row's own tokens, and local attention runs row by row over those.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

# The places of the tokens that are text, (valid,) long, for every row of a batch.
ValidText = tuple[torch.Tensor, ...]
# Query, key and value.
Projected = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def used_length(mask: torch.Tensor) -> int:
    """Text columns up to the last that some row of (batch, text) uses; at least one."""
    used = mask.any(dim=0).nonzero()
    return int(used[-1]) + 1 if len(used) else 1


def valid_text(mask: torch.Tensor | None) -> ValidText | None:
    """The places of text in every row of (batch, text) bool; None if there is no padding."""
    if mask is None or bool(mask.all()):
        return None
    return tuple(row.nonzero().flatten() for row in mask)


def attend_without_padding(
    tensors: Projected,
    valid: ValidText,
    text_length: int,
    attend: Callable[[Projected, int], torch.Tensor],
) -> torch.Tensor:
    """Attention in which padded text takes no part: nobody sees it, and it gets zeros.

    Args:
        tensors: query, key and value, (batch, sequence, heads, head_dim), text first.
        valid: see `valid_text`.
        text_length: tokens of text, padding included.
        attend: of such tensors for one row without its padding, and the length of its text.

    Raises:
        ValueError: as many rows of `valid` as of the batch are needed.
    """
    batch = tensors[0].shape[0]
    if len(valid) != batch:
        raise ValueError(
            f"CLEAR: the mask of padded text is for a batch of {len(valid)}, the layer got {batch}."
        )
    rows = []
    for row, places in enumerate(valid):
        query, key, value = (
            torch.cat([x[row : row + 1, places], x[row : row + 1, text_length:]], dim=1)
            for x in tensors
        )
        out = attend((query, key, value), len(places))
        text = out.new_zeros(1, text_length, *out.shape[2:])
        text = text.index_copy(1, places, out[:, : len(places)])
        rows.append(torch.cat([text, out[:, len(places) :]], dim=1))
    return torch.cat(rows)
