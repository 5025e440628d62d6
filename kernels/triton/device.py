"""What a device can run, told without importing Triton."""

from __future__ import annotations

import functools
from importlib.util import find_spec

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_HEAD_DIM = 256
# Where there is no GPU, Triton's interpreter runs, and any table serves it.
INTERPRETER = "sm_80"
# Several run at a time, and a few rounds of them even out the last one.
PROGRAMS_PER_MULTIPROCESSOR = 8


def why_not_triton(query: torch.Tensor, needs_grad: bool, return_lse: bool) -> str | None:
    """Why the Triton kernels cannot run on these inputs; None if they can."""
    if query.device.type != "cuda":
        return f"needs a CUDA or ROCm device, got a query on {query.device.type!r}"
    if find_spec("triton") is None:
        return "needs the package triton, which is not installed"
    if query.dtype not in DTYPES:
        return f"takes float16, bfloat16 or float32, got {query.dtype}"
    if not 1 <= query.shape[-1] <= LARGEST_HEAD_DIM:
        return f"takes a head_dim of 1 to {LARGEST_HEAD_DIM}, got {query.shape[-1]}"
    if torch.version.hip is None and torch.cuda.get_device_capability(query.device) < (8, 0):
        found = ".".join(map(str, torch.cuda.get_device_capability(query.device)))
        return f"needs compute capability 8.0 (Ampere) or later, got {found}"
    return None


@functools.cache
def architecture(device: torch.device) -> str:
    """The tables' name of a device's architecture: its own, or that of the nearest relative."""
    if device.type != "cuda":
        return INTERPRETER
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major == 9:
        return "sm_90"
    if major in (10, 11):
        return "sm_100"
    if major == 8 and minor in (0, 6, 9):
        return f"sm_8{minor}"
    return "sm_86"  # 8.7 and 12.x: no more shared memory than this for sure


@functools.cache
def programs(device: torch.device) -> int:
    """How many programs fill a device evenly; long walks are split until there are as many."""
    if device.type != "cuda":
        return 8
    return PROGRAMS_PER_MULTIPROCESSOR * (
        torch.cuda.get_device_properties(device).multi_processor_count
    )
