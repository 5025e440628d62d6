"""A whole denoising step of a model, full attention against CLEAR, and what the FLOPs allow."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ..counting.flops import config_of, count_flops
from ..counting.inputs import Random, model_inputs, positions_for
from ..counting.pass_flops import PassFlops
from ..errors import RequestError
from ..families.schedule import Schedule
from ..families.table import attention_layers, transformer_of
from ..generation.checks import check_quantize, find_impl, find_window
from ..generation.denoising import text_length
from ..generation.models import find_model, load_pipeline
from ..kernels.window import Window
from ..plugin import apply_clear
from ..weights.forward import changed_in_forwards, other_attributes
from ..weights.quantise import quantize as quantise
from .step import output_of, relative_error, step_report, verdict
from .timing import time_in_turn

# Token grid of the check before the timing.
CHECK_ROWS, CHECK_COLUMNS = 8, 12
# Noise level of the forwards, see `counting.inputs`.
LEVEL = 0.5


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
    quantize: str | None = None,
    schedule: Schedule | None = None,
) -> dict[str, Any]:
    """Check, then time one forward pass of the transformer (one pass of guidance).

    Args:
        height, width: in pixels; radius in tokens.
        far: whether with far keys.
        quantize: a kind of `quantize`, for both; None for `dtype`.
        schedule: radii by layer instead, those at the noise level `LEVEL`; with its own far keys.

    Returns:
        rows with attention, seconds, tflop; `speedup`; `flops_allow`, the ratio of the FLOPs of
        both: linear layers (counted by PyTorch) and attention (4 per attended pair and channel).
    """
    if schedule is not None:
        radius, far = schedule.radius, schedule.far
    side = find_model(model).token_pixels
    window = find_window(height, width, radius, token_pixels=side, far=far)
    name = find_impl(impl, dtype, device)
    check_quantize(quantize, device, dtype)
    pipe = load_pipeline(model, dtype, device if quantize is None else torch.device("cpu"))
    if quantize is not None:
        quantise(pipe, quantize, device)
        pipe.to(device)
    transformer: Any = transformer_of(pipe, "bench denoise")
    if schedule is not None:
        try:
            schedule.check_model("--schedule", transformer)
        except ValueError as refused:
            raise RequestError(str(refused)) from refused
    window = replace(window, text_length=text_length(pipe))
    layers = attention_layers(transformer)

    def processors() -> dict[Any, Any]:
        return {attn: attn.processor for attn in layers.values()}

    def inputs_of(window: Window) -> dict[str, Any]:
        return model_inputs(transformer, window, Random(dtype, device))

    @torch.no_grad()
    def step(own: dict[Any, Any], inputs: dict[str, Any]) -> torch.Tensor:
        with changed_in_forwards(transformer, lambda model: other_attributes("processor", own)):
            return output_of(transformer, inputs)

    inputs = inputs_of(window)
    small = inputs_of(replace(window, height=CHECK_ROWS, width=CHECK_COLUMNS))
    with positions_for(transformer, window, inputs):
        # Correct first: past the diagonal, local attention is full attention.
        stock = processors()
        apply_clear(pipe, radius=CHECK_ROWS + CHECK_COLUMNS, far=far, impl=impl)
        wide = step(processors(), small)
        if schedule is None:
            apply_clear(pipe, radius=radius, far=far, impl=impl)
        else:
            apply_clear(pipe, schedule=schedule, impl=impl)
        local = processors()
        error = relative_error(wide, step(stock, small))
        runs = {"full": partial(step, stock, inputs), "clear": partial(step, local, inputs)}
        seconds = time_in_turn(runs, repeats, device)
    counted = count_flops(config_of(transformer), window)["rows"]
    tflop = {row["attention"]: row["total_tflop"] for row in counted}
    if schedule is not None:
        flops = PassFlops.of(config_of(transformer), window.text_length)
        tflop["clear"] = flops.scheduled(window, schedule, LEVEL) / 1e12
    return {
        "rows": [
            {"attention": name, "seconds": seconds[name], "tflop": tflop[name]}
            for name in ("full", "clear")
        ],
        "speedup": seconds["full"] / seconds["clear"],
        "flops_allow": tflop["full"] / tflop["clear"],
        "model": model,
        "height": height,
        "width": width,
        "radius": radius,
        "far": far,
        "schedule": None if schedule is None else schedule.digest,
        "text_length": window.text_length,
        "quantize": quantize,
        "impl": name,
        **verdict(error, dtype, device),
    }


def report(result: dict[str, Any]) -> str:
    """The table of a result, and the gain beside what the FLOPs allow."""
    return step_report(
        result,
        f"CLEAR is {result['speedup']:.2f} times faster a step; "
        f"the FLOPs allow {result['flops_allow']:.2f}",
    )
