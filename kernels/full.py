"""Full attention, where a window is the whole image: PyTorch's own."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from .groups import group_of


def full_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float
) -> torch.Tensor:
    """Every query over every key; without a mask, so that its kernels take linear memory.

    Args:
        query, key, value, scale: as in `local_attention`.

    Returns:
        Shape and dtype of the query.
    """
    group, length = group_of(query, key), query.shape[1]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if group > 1:
        # Heads that read the same key are further queries: no key need be repeated.
        query = query.unflatten(1, (-1, group)).flatten(2, 3)
    out = scaled_dot_product_attention(query, key, value, scale=scale)
    if group > 1:
        out = out.unflatten(2, (group, length)).flatten(1, 2)
    return out.transpose(1, 2)
