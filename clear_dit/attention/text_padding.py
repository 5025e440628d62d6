"""Prompts of different lengths in one batch, without a mask over queries and keys.

Padding that no row of the batch uses is cut off before the model sees it. What is left is kept as
the places of every row's own tokens, and local attention runs row by row over those.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

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


class Row(NamedTuple):
    """One sample of a batch of prompts of different lengths.

    Attributes:
        number: in the batch.
        places: of its text, (valid,) long.
        text_length: tokens of text in the batch, padding included.
    """

    number: int
    places: torch.Tensor
    text_length: int

    def sample(self, tensor: torch.Tensor) -> torch.Tensor:
        """Its own of (batch, ...), (1, ...)."""
        return tensor[self.number : self.number + 1]

    def tokens(self, *tensors: torch.Tensor) -> Any:
        """Its own of (batch, text + image, ...) each, without padding, in a batch of one."""
        return tuple(
            torch.cat([one[:, self.places], one[:, self.text_length :]], dim=1)
            for one in map(self.sample, tensors)
        )


def attend_without_padding(
    batch: int,
    valid: ValidText,
    text_length: int,
    attend: Callable[[Row], torch.Tensor],
) -> torch.Tensor:
    """Attention in which padded text takes no part: nobody sees it, and it gets zeros.

    Args:
        batch: number of samples.
        valid: see `valid_text`.
        text_length: tokens of text, padding included.
        attend: what the tokens of one sample get, (1, valid + image, heads, head_dim).

    Returns:
        (batch, text + image, heads, head_dim).

    Raises:
        ValueError: as many rows of `valid` as of the batch are needed.
    """
    if len(valid) != batch:
        raise ValueError(
            f"CLEAR: the mask of padded text is for a batch of {len(valid)}, the layer got {batch}."
        )
    rows = []
    for number, places in enumerate(valid):
        out = attend(Row(number, places, text_length))
        text = out.new_zeros(1, text_length, *out.shape[2:])
        text = text.index_copy(1, places, out[:, : len(places)])
        rows.append(torch.cat([text, out[:, len(places) :]], dim=1))
    return torch.cat(rows)
