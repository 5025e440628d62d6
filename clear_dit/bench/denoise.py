"""A whole denoising step of a model, full attention against CLEAR, and what the FLOPs allow."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..families.table import attention_layers
from ..generation.checks import find_impl, find_window
from ..generation.denoising import text_length
from ..generation.models import TOKEN_PIXELS, load_pipeline
from ..plugin import apply_clear
from ..weights.forward import changed_in_forwards, other_attributes
from .step import relative_error, step_inputs, step_report, verdict
from .timing import time_in_turn

# Token grid of the check before the timing.
CHECK_ROWS, CHECK_COLUMNS = 8, 12


def bench_denoise(
    model: str,
    height: int,
    width: int,
    radius: int,
    far: bool,
    impl: str,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
) -> dict[str, Any]:
    """Check, then time one forward pass of the transformer (one pass of guidance).

    Args:
        height, width: in pixels; radius in tokens.
        far: whether with far keys.

    Returns:
        rows with attention, seconds, tflop; `speedup`; `flops_allow`, the ratio of the FLOPs of
        both: linear layers (counted by PyTorch) and attention (4 per attended pair and channel).
    """
    name = find_impl(impl, dtype, device)
    pipe = load_pipeline(model, dtype, device)
    transformer = pipe.transformer
    rows, columns = height // TOKEN_PIXELS, width // TOKEN_PIXELS
    text_tokens = text_length(pipe)
    stock = transformer.attn_processors

    @torch.no_grad()
    def step(processors: dict[str, Any], inputs: dict[str, Any]) -> torch.Tensor:
        layers = attention_layers(transformer).items()
        own = {attn: processors[f"{name}.processor"] for name, attn in layers}
        with changed_in_forwards(transformer, lambda model: other_attributes("processor", own)):
            return transformer(**inputs, return_dict=False)[0]

    # Correct first: past the diagonal, local attention is full attention.
    small = step_inputs(pipe, CHECK_ROWS, CHECK_COLUMNS, text_tokens)
    apply_clear(pipe, radius=CHECK_ROWS + CHECK_COLUMNS, far=far, impl=impl)
    wide = step(transformer.attn_processors, small)
    apply_clear(pipe, radius=radius, far=far, impl=impl)
    local = transformer.attn_processors
    full = step(stock, small)
    error = relative_error(wide, full)

    inputs = step_inputs(pipe, rows, columns, text_tokens)
    runs = {"full": partial(step, stock, inputs), "clear": partial(step, local, inputs)}
    flops = step_flops(pipe, rows, columns, radius, far)
    seconds = time_in_turn(runs, repeats, device)
    return {
        "rows": [
            {"attention": name, "seconds": seconds[name], "tflop": flops[name] / 1e12}
            for name in ("full", "clear")
        ],
        "speedup": seconds["full"] / seconds["clear"],
        "flops_allow": flops["full"] / flops["clear"],
        "model": model,
        "height": height,
        "width": width,
        "radius": radius,
        "far": far,
        "text_length": text_tokens,
        "impl": name,
        **verdict(error, dtype, device),
    }


def step_flops(
    pipe: Any, rows: int, columns: int, radius: int, far: bool = False
) -> dict[str, int]:
    """FLOPs of one forward pass for an image, with "full" attention and with "clear".

    Args:
        pipe: a FLUX pipeline.
        rows, columns, radius: in tokens.
        far: whether with far keys.
    """
    config, text_tokens = pipe.transformer.config, text_length(pipe)
    window = find_window(
        rows * TOKEN_PIXELS, columns * TOKEN_PIXELS, radius, 1, text_tokens, far=far
    )
    layers = config.num_layers + config.num_single_layers
    heads, head_dim = config.num_attention_heads, config.attention_head_dim
    linear = _linear_flops(pipe.transformer, step_inputs(pipe, rows, columns, text_tokens, "meta"))
    dense_pairs = window.sequence_length**2
    return {
        "full": linear + layers * 4 * dense_pairs * heads * head_dim,
        "clear": linear + layers * window.attention_flops(heads, head_dim),
    }


def _linear_flops(transformer: Any, inputs: dict[str, torch.Tensor | None]) -> int:
    """FLOPs outside attention, counted on the meta device, where the inputs are."""
    with torch.device("meta"):
        meta = type(transformer).from_config(transformer.config)
    inputs = {
        name: None if value is None else value.to(meta.dtype) for name, value in inputs.items()
    }
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        meta(**inputs)
    products = (torch.ops.aten.mm, torch.ops.aten.addmm)
    counts = counter.get_flop_counts()["Global"]
    return sum(count for op, count in counts.items() if op in products)


def report(result: dict[str, Any]) -> str:
    """The table of a result, and the gain beside what the FLOPs allow."""
    return step_report(
        result,
        f"CLEAR is {result['speedup']:.2f} times faster a step; "
        f"the FLOPs allow {result['flops_allow']:.2f}",
    )
