"""CLEAR attention from its definition, in float64, written without the package's own helpers."""

import torch


def mask_by_definition(window) -> torch.Tensor:
    """(text + image, text + image) bool, by a loop over image tokens."""
    text, total = window.text_length, window.text_length + window.height * window.width
    mask = torch.ones(total, total, dtype=torch.bool)
    ys = torch.arange(window.height)[:, None]
    xs = torch.arange(window.width)[None, :]
    for y in range(window.height):
        for x in range(window.width):
            inside = (ys - y) ** 2 + (xs - x) ** 2 < window.radius**2
            mask[text + y * window.width + x, text:] = inside.flatten()
    return mask


def pool_by_definition(tokens, window, weight):
    """Sum of weight times token over each cell, times (cell size / tokens present)."""
    f = window.down_factor
    image = tokens[:, window.text_length :].unflatten(1, (window.height, window.width))
    cells = []
    for top in range(0, window.height, f):
        for left in range(0, window.width, f):
            cell = image[:, top : top + f, left : left + f]
            part = weight[: cell.shape[1], : cell.shape[2]]
            present = part.numel()
            cells.append((cell * part[None, :, :, None, None]).sum(dim=(1, 2)) * (f * f / present))
    return torch.stack(cells, dim=1)


def attention_by_definition(q, k, v, window, scale, weight=None):
    """Masked softmax attention in the dtype of the inputs: the plain implementation.

    In float64 it is the oracle; in another dtype its error is the yardstick for that dtype.
    """
    mask = mask_by_definition(window)
    if window.down_factor > 1:
        f = window.down_factor
        weight = torch.full((f, f), f**-2.0, dtype=q.dtype) if weight is None else weight
        weight = weight.reshape(f, f)
        pooled_k = pool_by_definition(k, window, weight)
        pooled_v = pool_by_definition(v, window, weight)
        k, v = torch.cat([k, pooled_k], dim=1), torch.cat([v, pooled_v], dim=1)
        pooled_mask = torch.ones(mask.shape[0], pooled_k.shape[1], dtype=torch.bool)
        pooled_mask[: window.text_length] = False
        mask = torch.cat([mask, pooled_mask], dim=1)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    probability = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return torch.einsum("bhqk,bkhd->bqhd", probability, v)


def relative_error(value, exact) -> float:
    """Norm of the difference over norm of the exact value."""
    value, exact = value.detach().double(), exact.detach().double()
    return float((value - exact).norm() / exact.norm().clamp_min(1e-30))
