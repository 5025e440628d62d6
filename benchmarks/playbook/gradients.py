"""Gradients of attention in float64, of a sample of tokens: an image of 8192 px has too many."""

from __future__ import annotations

import torch

from clear_dit.bench.peers import sees_window
from clear_dit.kernels.window import Window

SAMPLED = 48
TEXT_SAMPLED = 8


def sampled_gradient_errors(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad: torch.Tensor,
    window: Window,
) -> dict[str, float]:
    """Relative error of the gradients of query, key and value: of text and image tokens the larger.

    A token's gradient as a key needs the rows of all queries that see it: their log-sum-exp and
    output are taken as found, for those are checked on their own. No pooled keys.

    Args:
        query, key, value: (1, text + image, heads, head_dim), with their gradients.
        out, lse, grad: the forward pass's results, and the gradient of `out`.
    """
    text, heads, head_dim = window.text_length, query.shape[2], query.shape[3]
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, window.image_length, (SAMPLED,), generator=generator)
    corners = torch.tensor([0, window.width - 1, window.image_length - 1])
    words = torch.arange(0, text, max(1, text // TEXT_SAMPLED))
    tokens = torch.cat([words, text + torch.cat([corners, image])]).unique().to(query.device)
    # (tokens, all): whom a token sees. Who sees it: the same image tokens, and all of the text.
    seen = sees_window(window, tokens)
    scale = head_dim**-0.5
    found, true = ({name: [] for name in ("query", "key", "value")} for _ in range(2))
    for head in range(heads):  # one after the other, for memory
        q, k, v, o, g = (x[0, :, head].detach().double() for x in (query, key, value, out, grad))
        of_rows = (o * g).sum(-1)
        scores = (q[tokens] @ k.T * scale).masked_fill(~seen, float("-inf"))
        probability = scores.softmax(-1)
        delta = of_rows[tokens, None]
        true["query"].append(probability * (g[tokens] @ v.T - delta) @ k * scale)
        weights = (k[tokens] @ q.T * scale - lse[0, :, head].double()).exp()
        weights = weights.masked_fill(~seen, 0.0)
        true["key"].append(weights * (v[tokens] @ g.T - of_rows) @ q * scale)
        true["value"].append(weights @ g)
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            assert tensor.grad is not None
            found[name].append(tensor.grad[0, tokens, head].double())
    errors = {}
    of_text = tokens < text
    for name in true:
        ours, exact = torch.stack(found[name]), torch.stack(true[name])
        parts = [
            float((ours[:, rows] - exact[:, rows]).norm() / exact[:, rows].norm())
            for rows in (of_text, ~of_text)
            if rows.any()
        ]
        errors[f"{name}_error"] = float(torch.tensor(parts).max())  # NaN if one is
    return errors
