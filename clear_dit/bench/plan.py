"""What a model will cost at a size: FLOPs and memory, without its weights and without a GPU.

FLOPs are those of one forward pass at batch 1 of the true configuration: matrix products of the
linear layers, counted by PyTorch, and attention, 4 per attended pair and channel. Norms, RoPE and
activations are not counted. Of memory, see `plan_memory`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..attention.norm_rope import HAS_TRITON
from ..chunking import chunk_feed_forward
from ..families.table import family_of, head_dim_of, heads_of
from ..generation.checks import find_window
from ..kernels.window import Window
from .configurations import find_configuration
from .executed import tile_choices
from .fake import build, defaults, quiet
from .inputs import Empty, clear_applied, forward, model_inputs, positions_for
from .plan_memory import check_memory_options, plan_memory
from .timing import table

# On the meta device stock attention is two batched products, and nothing else is one.
ATTENTION_OPS = (torch.ops.clear_dit.tiled_attention, torch.ops.aten.bmm)
LINEAR_OPS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.convolution)
OFFLOAD_WORDS = {
    "none": "all parts on the device",
    "model": "one part at a time on the device",
    "group": "one part at a time on the device, two blocks of the transformer",
}


def plan(
    model: str,
    height: int,
    width: int,
    radius: int,
    down_factor: int,
    far: bool,
    text_length: int | None,
    dtype: torch.dtype,
    weights_dtype: str | None = None,
    offload: str = "none",
) -> dict[str, Any]:
    """FLOPs of a step, the most CLEAR can gain, peak memory by stage, and what tiles cost.

    Args:
        model: a name or a folder, see `find_configuration`.
        height, width: in pixels; radius and down_factor in tokens.
        far: whether with far keys.
        text_length: text tokens; the model's own where None.
        dtype: of weights and activations.
        weights_dtype, offload: see `plan_memory`.

    Returns:
        rows with attention ("full", "clear"), linear_tflop, attention_tflop, total_tflop,
        attention_share and attention_gflop_per_layer; `bound`, the ratio of both totals; `memory`,
        see `plan_memory`; `peak_gib`, its highest total; `tiles`, see `tile_choices`; and the
        setting.

    Raises:
        RequestError: an unknown model, weights_dtype or offload, or a size, radius or down_factor
            out of its range.
    """
    check_memory_options(weights_dtype, offload)
    configuration = find_configuration(model)
    text_length = configuration.text_length if text_length is None else text_length
    window = find_window(
        height, width, radius, down_factor, text_length, configuration.token_pixels, far=far
    )
    flops = count_flops(configuration.transformer, window)
    memory = plan_memory(configuration, window, dtype, weights_dtype, offload)
    return {
        **flops,
        "memory": memory,
        "peak_gib": max(row["total_gib"] for row in memory),
        "tiles": tile_choices(window),
        "model": model,
        "height": height,
        "width": width,
        "token_rows": window.height,
        "token_columns": window.width,
        "radius": radius,
        "down_factor": down_factor,
        "far": far,
        "text_length": text_length,
        "dtype": str(dtype).removeprefix("torch."),
        "weights_dtype": weights_dtype,
        "offload": offload,
        "torch": torch.__version__,
    }


def config_of(transformer: Any) -> dict[str, Any]:
    """A loaded transformer's configuration, as `count_flops` takes it."""
    return {"_class_name": type(transformer).__name__, **transformer.config}


def count_flops(config: dict[str, Any], window: Window) -> dict[str, Any]:
    """FLOPs of a forward pass, full and local.

    Attention over text alone, as some families have it beside that over the image, is the same in
    both.

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
    # Not attention, but a weighted sum of keys and of values that PyTorch counts as a product.
    if window.down_factor > 1:
        cells = window.pooled_length * window.down_factor**2
        local -= len(layers) * 4 * cells * heads * head_dim
    rows = [
        {
            "attention": name,
            "linear_tflop": linear / 1e12,
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


def _count_products(model: Any, inputs: dict[str, Any]) -> tuple[int, int]:
    """FLOPs of one forward, those of attention apart: (linear layers, attention)."""
    with FlopCounterMode(display=False) as counter, quiet(), torch.no_grad():
        forward(model, inputs)
    counts = dict(counter.get_flop_counts()["Global"])
    attention = sum(counts.pop(op, 0) for op in ATTENTION_OPS)
    assert set(counts) <= set(LINEAR_OPS), counts
    return sum(counts.values()), attention


def report(result: dict[str, Any]) -> str:
    """The tables of a plan."""
    pooled = f", pooled by {result['down_factor']}" if result["down_factor"] > 1 else ""
    sees = ", far keys" if result["far"] else pooled
    flops = [
        {
            "attention": row["attention"],
            "linear TFLOP": number(row["linear_tflop"]),
            "attention TFLOP": number(row["attention_tflop"]),
            "sum TFLOP": number(row["total_tflop"]),
            "attention's share": f"{row['attention_share']:.1%}",
            "GFLOP per attention layer": number(row["attention_gflop_per_layer"]),
        }
        for row in result["rows"]
    ]
    memory = [
        {
            "stage": row["stage"],
            "weights GiB": number(row["weights_gib"]),
            "activations GiB": number(row["activations_gib"]),
            "sum GiB": number(row["total_gib"]),
        }
        for row in result["memory"]
    ]
    tiles = [
        {
            "attention by": row["impl"],
            "query tile": row["query_tile"],
            "key tile": row["key_tile"],
            "keys computed": f"{row['keys_per_query']:,.0f}",
            "computed / needed": f"{row['executed_over_exact']:.2f}",
        }
        for row in result["tiles"]
    ]
    weights = result["weights_dtype"]
    weights = "" if weights is None else f", the transformer's linear weights in {weights}"
    chunks = "feed-forward layers in chunks" if result["chunked"] else "feed-forward layers whole"
    fused = "in one kernel" if HAS_TRITON else "step by step, for want of Triton"
    return f"""\
{result["model"]}, {result["height"]} x {result["width"]} px, {result["dtype"]}{weights}
{result["token_rows"]} x {result["token_columns"]} image tokens, {result["text_length"]} text tokens
{result["layers"]} attention layers of {result["heads"]} heads x {result["head_dim"]}
CLEAR with radius {result["radius"]} tokens{sees}

One forward pass:
{table(flops)}
End to end, the FLOPs allow CLEAR to be at most {result["bound"]:.2f} times faster.

Peak memory with CLEAR, {OFFLOAD_WORDS[result["offload"]]}:
{table(memory)}
Tensors only: on a GPU the workspace of convolutions, products and attention, fragments and
PyTorch's own few hundred MiB come on top. Denoising: {chunks}, QK-norm and
RoPE {fused}. Decoding: the stock autoencoder on one tile and its
surroundings; not counted is the whole image, which need not be on the device.

Keys for each image query, text included, by choice of tiles (in tokens):
{table(tiles)}"""


def number(value: float) -> str:
    """Three digits at least."""
    return f"{value:,.1f}" if value >= 10 else f"{value:.3g}"
