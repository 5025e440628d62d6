"""The shape that counts: one layer of the largest image, forward; its kernels timed apart.

Right first: a sample of queries against float64, the text's, the image's and the log-sum-exp, and
every element written; of other entries than the default every row against it; and the same bits
again after all that is timed. What is wrong has no times.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton

from clear_dit.bench.timing import time_in_turn
from clear_dit.kernels.triton.ops import triton_attention
from clear_dit.kernels.window import Window

from . import ceilings
from .entries import default_entry
from .kernel_times import kernel_times
from .pin import pinned
from .right import checked, differences
from .setting import Setting, Task

# Kernels of the text's queries begin with this; all others are the image's.
TEXT_KERNELS = "text_"


def tasks(setting: Setting) -> list[Task]:
    """By the default entry, without far keys and with them; then the device's limits."""
    size = setting.sizes[-1]
    return [
        *(
            Task(
                f"{'far ' * far}r={radius}",
                partial(measure, setting, size, radius, far, default_entry(setting, far)),
            )
            for far, radii in ((False, setting.radii), (True, setting.far_radii))
            for radius in radii
        ),
        *ceilings.tasks(setting),
    ]


def measure(
    setting: Setting, size: int, radius: int, far: bool, entry: str
) -> Iterator[dict[str, Any]]:
    """One row: errors, and if they are small, times of the layer and of its kernels.

    compiled: how many kernels a carried cache lacked, or else were compiled meanwhile.
    """
    kernels_before = _kernels_in_cache()
    window = setting.window(size, radius, far)
    problem = setting.problem(window)
    tensors = problem.tensors()
    run = partial(triton_attention, *tensors, window, scale=setting.head_dim**-0.5)
    row: dict[str, Any] = {"size": size, "radius": radius, "far": far, "entry": entry}
    with pinned(entry):
        out, lse, errors, wrong = checked(run, tensors, window)
    row |= errors._asdict()
    default = default_entry(setting, far)
    if wrong is None and entry != default:
        with pinned(default):
            found, wrong = differences(out, lse, run(), window)
        row |= found
    if wrong is not None:
        yield row | {"problem": wrong}
        return
    with pinned(entry):
        (seconds,) = time_in_turn({"": run}, setting.repeats, setting.device).values()
        kernels = kernel_times(run, max(3, setting.repeats), setting.device)
        again = run()
    if not all(map(torch.equal, (out, lse), again)):
        yield row | {"problem": "wrong: other bits when it ran again"}
        return
    row |= rates(setting, window, seconds * 1e3, kernels)
    state = ceilings.clocks(("clocks.sm", "power.draw"))
    yield row | state | {"compiled": _kernels_in_cache() - kernels_before}


def _kernels_in_cache() -> int:
    return sum(1 for _ in Path(triton.knobs.cache.dir).rglob("*.cubin"))


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
