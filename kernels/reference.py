"""The oracle: CLEAR attention as a dense mask and a softmax. No fast path runs it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .groups import group_of
from .pooling import pooled_bias, pooled_keys
from .window import Window


def reference_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: Window,
    *,
    scale: float,
    spatial_weight: torch.Tensor | None = None,
    far_offset: torch.Tensor | None = None,
    pooled: tuple[torch.Tensor, torch.Tensor] | None = None,
    return_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense masked softmax in float32 (float64 if the inputs are). Quadratic in memory.

    Arguments are those of `local_attention`; (out, lse) is returned whatever `return_lse` says.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    q, k, v = (tensor.to(dtype) for tensor in (query, key, value))
    if pooled is None:
        pooled = pooled_keys(k, v, window, spatial_weight, scale)
    k, v = (torch.cat([x, part.to(dtype)], dim=1) for x, part in zip((k, v), pooled, strict=True))
    q = q.unflatten(2, (-1, group_of(query, key)))  # the group that reads each key head
    scores = torch.einsum("bqhgd,bkhd->bhgqk", q, k).flatten(1, 2) * scale
    bias = pooled_bias(window, query.shape[2], far_offset, q.device)
    scores = scores + F.pad(bias.T, (k.shape[1] - len(bias), 0))[:, None]
    scores = scores.masked_fill(~window.mask(query.device), float("-inf"))
    lse = scores.logsumexp(dim=-1)
    # A query that sees none of the keys given has output 0.
    finite = lse.masked_fill(lse == float("-inf"), 0.0)
    probability = torch.exp(scores - finite[..., None]).unflatten(1, q.shape[2:4])
    out = torch.einsum("bhgqk,bkhd->bqhgd", probability, v).flatten(2, 3)
    return out.to(query.dtype), lse.transpose(1, 2).to(torch.promote_types(dtype, torch.float32))
