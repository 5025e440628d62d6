"""FLOPs of a forward pass of a transformer's true configuration, at batch 1.

Matrix products of the linear layers, counted by PyTorch, and attention, 4 per attended pair and
channel. Norms, RoPE and activations are not counted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..chunking import chunk_feed_forward
from ..families.table import family_of, head_dim_of, heads_of
from ..kernels.window import Window
from .fake import build, defaults, quiet
from .inputs import Empty, clear_applied, forward, model_inputs, positions_for
from .narrow import use_narrow_linears

# On the meta device stock attention is two batched products, and nothing else is one.
ATTENTION_OPS = (torch.ops.clear_dit.tiled_attention, torch.ops.aten.bmm)
LINEAR_OPS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.convolution)
# Products in 8 and 4 bits; PyTorch counts some of them, not all, so they are what the others leave.
NARROW_OPS = (torch.ops.aten._int_mm, torch.ops.aten._scaled_mm)


def config_of(transformer: Any) -> dict[str, Any]:
    """A loaded transformer's configuration, as `count_flops` takes it."""
    return {"_class_name": type(transformer).__name__, **transformer.config}


def count_flops(
    config: dict[str, Any], window: Window, quantize: str | None = None
) -> dict[str, Any]:
    """FLOPs of a forward pass, full and local.

    Attention over text alone, as some families have it beside that over the image, is the same in
    both.

    Args:
        quantize: one of `quantize`'s kinds; FLOPs of its products are `narrow_tflop` in the rows,
            and no part of `linear_tflop`.

    Raises:
        RequestError: a size past the model's positions.
    """
    with defaults(torch.float32, "meta"):
        model = build(config)
    inputs = model_inputs(model, window, Empty(torch.float32, "meta"))
    family = family_of(model)
    layers = family.layers(model).values()
    heads, head_dim = heads_of(next(iter(layers))), head_dim_of(model)
    with positions_for(model, window, inputs):
        linear, full = _count_products(model, inputs)
        with clear_applied(model, window):
            if family.chunked:
                with quiet():
                    chunk_feed_forward(model, None)  # whole: the same products in fewer operators
            same, local = _count_products(model, inputs)
    assert linear == same
    wide = linear if quantize is None else _count_wide(config, window, quantize)
    # Not attention, but a weighted sum of keys and of values that PyTorch counts as a product.
    if window.down_factor > 1:
        cells = window.pooled_length * window.down_factor**2
        local -= len(layers) * 4 * cells * heads * head_dim
    rows = [
        {
            "attention": name,
            "linear_tflop": wide / 1e12,
            "narrow_tflop": (linear - wide) / 1e12,
            "attention_tflop": attention / 1e12,
            "total_tflop": (linear + attention) / 1e12,
            "attention_share": attention / (linear + attention),
            "attention_gflop_per_layer": attention / len(layers) / 1e9,
        }
        for name, attention in (("full", full), ("clear", local))
    ]
    return {
        "rows": rows,
        "bound": (linear + full) / (linear + local),
        "layers": len(layers),
        "heads": heads,
        "head_dim": head_dim,
        "chunked": family.chunked,
    }


def _count_wide(config: dict[str, Any], window: Window, quantize: str) -> int:
    """FLOPs of linear layers that are not in 8 or 4 bits."""
    with defaults(torch.bfloat16, "meta"):
        model = build(config)
        use_narrow_linears(model, quantize, chunk_rows=None)
    inputs = model_inputs(model, window, Empty(torch.bfloat16, "meta"))
    with positions_for(model, window, inputs):
        linear, _ = _count_products(model, inputs)
    return linear


def _count_products(model: Any, inputs: dict[str, Any]) -> tuple[int, int]:
    """FLOPs of one forward, those of attention apart: (linear layers, attention)."""
    with FlopCounterMode(display=False) as counter, quiet(), torch.no_grad():
        forward(model, inputs)
    counts = dict(counter.get_flop_counts()["Global"])
    attention = sum(counts.pop(op, 0) for op in ATTENTION_OPS)
    for op in NARROW_OPS:
        counts.pop(op, None)
    assert set(counts) <= set(LINEAR_OPS), counts
    return sum(counts.values()), attention
