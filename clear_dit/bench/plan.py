"""What a model will cost at a size: FLOPs and memory, without its weights and without a GPU.

Of FLOPs, see `counting/flops.py`; of memory, `plan_memory`.
"""

from __future__ import annotations

from typing import Any

import torch

from ..attention.norm_rope import HAS_TRITON
from ..counting.flops import count_flops
from ..generation.checks import find_window
from ..tables import number, table
from .configurations import find_configuration
from .executed import tile_choices
from .plan_memory import check_memory_options, plan_memory

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
    quantize: str | None = None,
    offload: str = "none",
) -> dict[str, Any]:
    """FLOPs of a step, the most CLEAR can gain, peak memory by stage, and what tiles cost.

    Args:
        model: a name or a folder, see `find_configuration`.
        height, width: in pixels; radius and down_factor in tokens.
        far: whether with far keys.
        text_length: text tokens; the model's own where None.
        dtype: of weights and activations.
        quantize, offload: see `plan_memory`.

    Returns:
        rows with attention ("full", "clear"), linear_tflop, narrow_tflop, attention_tflop,
        total_tflop, attention_share and attention_gflop_per_layer; `bound`, the ratio of both
        totals; `memory`, see `plan_memory`; `peak_gib`, its highest total; `tiles`, see
        `tile_choices`; and the setting.

    Raises:
        RequestError: an unknown model, quantize or offload, or a size, radius or down_factor
            out of its range.
    """
    check_memory_options(quantize, offload)
    configuration = find_configuration(model)
    text_length = configuration.text_length if text_length is None else text_length
    window = find_window(
        height, width, radius, down_factor, text_length, configuration.token_pixels, far=far
    )
    flops = count_flops(configuration.transformer, window, quantize)
    memory = plan_memory(configuration, window, dtype, quantize, offload)
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
        "quantize": quantize,
        "offload": offload,
        "torch": torch.__version__,
    }


def report(result: dict[str, Any]) -> str:
    """The tables of a plan."""
    pooled = f", pooled by {result['down_factor']}" if result["down_factor"] > 1 else ""
    sees = ", far keys" if result["far"] else pooled
    quantize = result["quantize"]

    def narrow(row: dict[str, Any]) -> dict[str, str]:
        return {} if quantize is None else {f"in {quantize}": number(row["narrow_tflop"])}

    flops = [
        {
            "attention": row["attention"],
            "linear TFLOP": number(row["linear_tflop"]),
            **narrow(row),
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
    weights = "" if quantize is None else f", the transformer's linear layers in {quantize}"
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
