"""Joining attention over disjoint sets of keys.

With out = softmax(s) v over one set of keys and lse = log(sum(exp(s))), two results join exactly:
the weights of the sets are exp(lse) (Dao et al., FlashAttention, arXiv 2205.14135, section 3.1).
Only the difference of the two enters, through a sigmoid, so nothing overflows.
"""

from __future__ import annotations

import torch


def merge(
    out: torch.Tensor, lse: torch.Tensor, other_out: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two disjoint key sets.

    Args:
        out, other_out: (..., head_dim), attention over each set.
        lse, other_lse: (...), natural-log sum of exponentials over each set; -inf for an empty set,
            in at most one of the two.

    Returns:
        (out, lse) over the union, in the dtypes of `out` and `lse`.
    """
    wide = out.to(torch.promote_types(out.dtype, lse.dtype), copy=True)
    merged_lse = lse.clone()
    merge_(wide, merged_lse, other_out, other_lse)
    return wide.to(out.dtype), merged_lse


def merge_(
    out: torch.Tensor, lse: torch.Tensor, other_out: torch.Tensor, other_lse: torch.Tensor
) -> None:
    """`merge` in place: `out` and `lse`, in one dtype, become those of the union. No gradients."""
    weight = torch.sigmoid(other_lse - lse).unsqueeze(-1)
    out.lerp_(other_out.to(out.dtype), weight)
    torch.logaddexp(lse, other_lse, out=lse)
