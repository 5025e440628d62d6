"""What the device reaches at best: a copy, a product, and reading what lies in its L2 cache."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from clear_dit.bench.timing import time_in_turn

from .setting import Setting, Task

CLOCKS = (
    "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "power.draw", "power.limit",
    "temperature.gpu", "driver_version", "clocks_event_reasons.active",
)  # fmt: skip
BLOCK = 8192


@triton.jit
def read_blocks(source, sums, blocks, BLOCK: tl.constexpr):
    """Every program reads all of source, int32 [blocks * BLOCK], past L1, from a block of its own
    on."""
    program = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.int32)
    for step in range(blocks):
        block = (program + step) % blocks
        total += tl.load(source + block * BLOCK + tl.arange(0, BLOCK), cache_modifier=".cg")
    tl.store(sums + program, tl.sum(total, axis=0))


def tasks(setting: Setting) -> list[Task]:
    """Of `production`. Clocks are read right after the product, which heats the device."""
    small = setting.device.type != "cuda"
    return [
        Task("copy", partial(_copy, setting, 2**16 if small else 2**31)),
        Task("L2", partial(_l2, setting, *((2, 2) if small else (528, 512)))),
        Task("product", partial(_product, setting, 64 if small else 8192)),
    ]


def _copy(setting: Setting, size: int) -> Iterator[dict[str, Any]]:
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    (seconds,) = time_in_turn({"": lambda: target.copy_(source)}, 5, setting.device).values()
    yield {"bytes": 2 * size, "copy_gb_s": 2 * size / seconds / 1e9}


def _l2(setting: Setting, programs: int, blocks: int) -> Iterator[dict[str, Any]]:
    source = torch.randint(0, 9, (blocks * BLOCK,), dtype=torch.int32, device=setting.device)
    sums = torch.zeros(programs, dtype=torch.int32, device=setting.device)

    def run() -> None:
        read_blocks[(programs,)](source, sums, blocks, BLOCK=BLOCK, num_warps=8)

    run()
    if not (sums == source.sum(dtype=torch.int32)).all():
        yield {"problem": "wrong: programs that read the same found other sums"}
        return
    (seconds,) = time_in_turn({"": run}, 5, setting.device).values()
    moved = programs * source.nbytes
    yield {"bytes": source.nbytes, "l2_read_gb_s": moved / seconds / 1e9}


def _product(setting: Setting, side: int) -> Iterator[dict[str, Any]]:
    a, b = (torch.randn(side, side, device=setting.device).bfloat16() for _ in range(2))
    (seconds,) = time_in_turn({"": lambda: a @ b}, 5, setting.device).values()
    yield {"side": side, "bf16_product_tflops": 2 * side**3 / seconds / 1e12, **clocks()}


def clocks(names: tuple[str, ...] = CLOCKS) -> dict[str, Any]:
    """What the driver says of the device."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {"clocks": "no nvidia-smi"}
    asked = [tool, f"--query-gpu={','.join(names)}", "--format=csv,noheader", "-i", "0"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=10)
    except subprocess.TimeoutExpired:
        return {"clocks": "nvidia-smi did not answer"}
    values = done.stdout.strip().split(", ")
    if done.returncode or len(values) != len(names):
        return {"clocks": done.stdout.strip()[:200]}
    return {"clocks": dict(zip(names, values, strict=True))}
