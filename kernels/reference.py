"""The oracle: CLEAR attention as a dense mask and a softmax. Nothing faster imports this file."""

from __future__ import annotations

import torch

from .pooling import pool_tokens
from .window import Window


def reference_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: Window,
    *,
    scale: float,
    spatial_weight: torch.Tensor | None = None,
    return_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense masked softmax in float32 (float64 if the inputs are). Quadratic in memory.

    Arguments are those of `local_attention`; (out, lse) is returned whatever `return_lse` says.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    q, k, v = (tensor.to(dtype) for tensor in (query, key, value))
    if window.down_factor > 1:
        k = torch.cat([k, pool_tokens(k, window, spatial_weight)], dim=1)
        v = torch.cat([v, pool_tokens(v, window, spatial_weight)], dim=1)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    scores = scores.masked_fill(~window.mask(query.device), float("-inf"))
    lse = scores.logsumexp(dim=-1)
    out = torch.einsum("bhqk,bkhd->bqhd", torch.exp(scores - lse[..., None]), v)
    return out.to(query.dtype), lse.transpose(1, 2).to(torch.promote_types(dtype, torch.float32))
