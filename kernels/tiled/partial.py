"""Softmax attention over one set of keys, with the log-sum-exp that lets sets be merged exactly.

The backward pass takes the output and log-sum-exp over *all* keys: the probabilities of a subset
are exp(score - lse), so the gradients of the subsets simply add (arXiv 2205.14135, algorithm 4).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..groups import from_members, members
from ..merge import merge_

# Keys and queries that `attend_all` takes at a time: where there is no fused attention, scores are
# stored.
KEYS = 4096
QUERIES = 1024

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Half precision is computed in float32 on a CPU: measured as fast, and more exact."""
    if device.type == "cpu":
        return torch.promote_types(dtype, torch.float32)
    return dtype


def has_flash(device: torch.device) -> bool:
    """Whether PyTorch's fused CPU attention serves; elsewhere the plain form below does."""
    return device.type == "cpu"


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every query over these keys.

    Args:
        query: (batch, heads, queries, head_dim), head_dim contiguous.
        key, value: (batch, key heads, keys, head_dim), at least one key, head_dim contiguous.
        bias: (batch, 1 or heads, queries, keys) added to the scaled scores, or None.

    Returns:
        out (batch, heads, queries, head_dim) and lse (batch, heads, queries), float32 or wider.
    """
    group = query.shape[1] // key.shape[1]
    parts = [
        _attend(one_query, key, value, scale, one_bias)
        for one_query, one_bias in zip(members(query, group), _biases(bias, group), strict=True)
    ]
    outs, lses = zip(*parts, strict=True)
    return from_members(outs), from_members(lses)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend` with as many key heads as heads."""
    if has_flash(query.device):
        return _flash(query, key, value, attn_mask=bias, scale=scale)
    scores = _scores(query, key, scale, bias)
    lse = scores.logsumexp(dim=-1)
    out = torch.exp(scores - lse[..., None]).to(value.dtype) @ value
    # Wide, because many parts are merged: rounding each merge to half precision would add up.
    return out.to(lse.dtype), lse


def _biases(bias: torch.Tensor | None, group: int) -> Sequence[torch.Tensor | None]:
    """Those of the members of a group, of all heads or of each."""
    if bias is None or bias.shape[1] == 1:
        return [bias] * group
    return members(bias, group)


def attend_all(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every query over any number of keys, by blocks of both.

    Args:
        query: (batch, queries, heads, head_dim), head_dim contiguous.
        key, value: (batch, keys, key heads, head_dim), at least one key, head_dim contiguous.

    Returns:
        out, shaped as `query`, and lse (batch, queries, heads), float32 or wider.
    """
    dtype = compute_dtype(query.dtype, query.device)
    out = query.new_zeros(query.shape, dtype=torch.promote_types(query.dtype, torch.float32))
    lse = out.new_full(out.shape[:-1], float("-inf"))
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    blocks = (x.split(QUERIES, 2) for x in (query, out.transpose(1, 2), lse.transpose(1, 2)))
    for queries, part_out, part_lse in zip(*blocks, strict=True):
        queries = queries.to(dtype)
        for keys, values in zip(key.split(KEYS, 2), value.split(KEYS, 2), strict=True):
            merge_(part_out, part_lse, *attend(queries, keys.to(dtype), values.to(dtype), scale))
    return out, lse


def attend_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `attend` with respect to query, key and value.

    Args:
        grad: gradient of the loss by the merged output; (batch, heads, queries, head_dim).
        out, lse: merged over all keys the query sees, in the shapes `attend` returns.
    """
    group = query.shape[1] // key.shape[1]
    of_members = (members(x, group) for x in (grad, query, out, lse))
    queries, sums = [], None
    for one_grad, one_query, one_out, one_lse, one_bias in zip(
        *of_members, _biases(bias, group), strict=True
    ):
        of_query, *of_keys = _attend_backward(
            one_grad, one_query, key, value, one_out, one_lse.contiguous(), scale, one_bias
        )
        queries.append(of_query)
        if sums is None:
            sums = of_keys
        else:  # of half precision in a wider one
            sums = [total + part.to(lse.dtype) for total, part in zip(sums, of_keys, strict=True)]
    assert sums is not None
    return from_members(queries), sums[0], sums[1]


def _attend_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`attend_backward` with as many key heads as heads; lse is contiguous."""
    if has_flash(query.device):
        return _flash_backward(
            grad, query, key, value, out, lse, 0.0, False, attn_mask=bias, scale=scale
        )
    probability = torch.exp(_scores(query, key, scale, bias) - lse[..., None])
    grad_value = probability.to(grad.dtype).transpose(-2, -1) @ grad
    grad_probability = (grad @ value.transpose(-2, -1)).to(probability.dtype)
    delta = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(dim=-1, keepdim=True)
    grad_scores = (probability * (grad_probability - delta) * scale).to(query.dtype)
    return grad_scores @ key, grad_scores.transpose(-2, -1) @ query, grad_value


def _scores(
    query: torch.Tensor, key: torch.Tensor, scale: float, bias: torch.Tensor | None
) -> torch.Tensor:
    scores = (query * scale) @ key.transpose(-2, -1)  # scaled first: float16 would overflow
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return scores if bias is None else scores + bias
