"""Grouped queries (arXiv 2305.13245): every key head serves a group of query heads.

Query head h reads key head h // group. Where there are as many key heads as heads, a group is one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def group_of(query: torch.Tensor, key: torch.Tensor) -> int:
    """How many heads of a query read each head of a key, (batch, tokens, heads, head_dim) each."""
    return query.shape[2] // key.shape[2]


def members(x: torch.Tensor, group: int) -> tuple[torch.Tensor, ...]:
    """Of what is (batch, heads, ...) the heads that are first of their group, second and so on.

    `group` views of (batch, key heads, ...), each as many heads as there are key heads.
    """
    return x.unflatten(1, (-1, group)).unbind(2)


def from_members(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Inverse of `members`, in memory of its own unless a group is one."""
    return parts[0] if len(parts) == 1 else torch.stack(tuple(parts), 2).flatten(1, 2)
