"""The shape that counts: one layer of the largest image, forward; its kernels timed apart.

Right first: a sample of queries against float64, the text's, the image's and the log-sum-exp, and
every element written. What is wrong has no times.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from clear_dit.bench.attention import sampled_errors
from clear_dit.bench.timing import time_in_turn
from clear_dit.kernels.triton.ops import triton_attention
from clear_dit.kernels.window import Window

from .checks import poisoned
from .kernel_times import kernel_times
from .pin import pinned
from .setting import Setting, Task

# Kernels of the text's queries begin with this; all others are the image's.
TEXT_KERNELS = "text_"


def tasks(setting: Setting) -> list[Task]:
    """As a model calls it, without far keys and with them."""
    size = setting.sizes[-1]
    return [
        Task(
            f"{'far ' * far}r={radius}",
            partial(measure, setting, size, radius, far, None),
        )
        for far, radii in ((False, setting.radii), (True, setting.far_radii))
        for radius in radii
    ]


def measure(
    setting: Setting, size: int, radius: int, far: bool, entry: str | None
) -> Iterator[dict[str, Any]]:
    """One row: errors, and if they are small, times of the layer and of its kernels."""
    window = setting.window(size, radius, far)
    problem = setting.problem(window)
    tensors = problem.tensors()
    run = partial(triton_attention, *tensors, window, scale=setting.head_dim**-0.5)
    row: dict[str, Any] = {"size": size, "radius": radius, "far": far, "entry": entry}
    with pinned(entry):
        with poisoned():
            out, lse = run()
        errors = sampled_errors(out, tensors, window, lse=lse)
        row |= errors._asdict()
        if not errors.right(setting.dtype, window.pooled_length > 0):
            yield row | {"problem": f"wrong: {errors}"}
            return
        if not (out.isfinite().all() and lse.isfinite().all()):
            yield row | {"problem": "wrong: some results are not written, or not finite"}
            return
        del out, lse
        (seconds,) = time_in_turn({"": run}, setting.repeats, setting.device).values()
        kernels = kernel_times(run, max(3, setting.repeats), setting.device)
    yield row | rates(setting, window, seconds * 1e3, kernels)


def rates(setting: Setting, window: Window, ms: float, kernels: dict[str, float]) -> dict[str, Any]:
    """Times and useful TFLOP/s: of the layer, and of the image's and the text's queries apart."""
    flops = window.attention_flops(setting.heads, setting.head_dim)
    text = window.text_length * window.sequence_length
    text_flops = 4 * text * setting.heads * setting.head_dim
    text_ms = sum(ms for name, ms in kernels.items() if name.startswith(TEXT_KERNELS))
    image_ms = sum(kernels.values()) - text_ms
    return {
        "ms": ms,
        "useful_tflops": flops / ms / 1e9,
        "image_tflops": (flops - text_flops) / image_ms / 1e9,
        "text_tflops": text_flops / text_ms / 1e9 if text_ms else None,
        "kernels_ms": kernels,
    }
