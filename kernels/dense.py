"""Attention of queries over all of many keys: what text is given, and reference images.

Together with the log-sum-exp, which joins it exactly with attention over other keys (merge.py). An
opaque operator, as the other kernels with loops of their own are (opaque.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from .choice import select_impl
from .groups import group_of
from .namespace import NAMESPACE
from .opaque import channels_contiguous
from .tiled.partial import attend_all
from .triton.device import NoEntryError


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every query over every key, without gradients.

    Args:
        query: (batch, queries, heads, head_dim), at least one.
        key, value: (batch, keys, key heads, head_dim), at least one; heads as in `local_attention`.
        impl: as in `local_attention`; all but "triton" are PyTorch's own attention here.

    Returns:
        out, shaped as `query`, and natural-log log-sum-exp (batch, queries, heads), both float32
        or wider, to be merged.

    Raises:
        ValueError: unknown `impl`, or an explicit one that cannot run here.
        NoEntryError: an explicit "triton" whose kernel fails on this device.
    """
    group = group_of(query, key)
    by_triton = select_impl(impl, query, kernels=("text",), group=group) == "triton"
    try:
        return _op(query, key, value, scale, by_triton)
    except NoEntryError:  # what failed was logged as a warning
        if impl != "auto":
            raise
    return _op(query, key, value, scale, False)


def _forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, by_triton: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    if by_triton:
        from .triton.ops import triton_dense_attention

        return triton_dense_attention(query, key, value, scale)
    query, key, value = channels_contiguous(query, key, value)
    return attend_all(query, key, value, scale)


_op = torch.library.custom_op(f"{NAMESPACE}::dense_attention", _forward, mutates_args=())


@_op.register_fake
def _fake(query, key, value, scale, by_triton):
    out = query.new_empty(query.shape, dtype=torch.promote_types(query.dtype, torch.float32))
    return out, out.new_empty(query.shape[:-1])


@register_flop_formula(getattr(torch.ops, NAMESPACE).dense_attention)
def _flops(query: Any, key: Any, *_: Any, **__: Any) -> int:
    batch, queries, heads, head_dim = query
    return 4 * batch * queries * key[1] * heads * head_dim
