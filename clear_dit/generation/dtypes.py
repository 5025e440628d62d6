"""What `--dtype auto` is: by device, by what its processor can, for images and in training."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from .checks import DTYPES, find_dtype

AUTO = "auto"
# As Linux names them: AVX-512 BF16 and AMX of x86, BF16 of ARM.
_BFLOAT16_UNITS = {"avx512_bf16", "amx_bf16", "bf16"}
_CPU_INFO = Path("/proc/cpuinfo")
_FLAGS = ("flags", "Features")


def resolve_dtype(name: str, device: torch.device, *, training: bool = False) -> str:
    """The name of the dtype that an option or a field means, one of DTYPES.

    Args:
        name: one of DTYPES, or "auto". That is bfloat16 on a GPU, float16 on a CUDA device without
            bfloat16, and float32 on a CPU, in training bfloat16 where the CPU has units for it.
            Images are float32 on every CPU: another one changes them by rounding at most.
        device: where it is computed.
        training: samples and distillation, not images.

    Raises:
        RequestError: another name.
    """
    if name != AUTO:
        find_dtype(name, (AUTO, *DTYPES))
        return name
    if device.type == "cpu":
        return "bfloat16" if training and cpu_has_bfloat16() else "float32"
    return "bfloat16" if device.type != "cuda" or _cuda_has_bfloat16(device) else "float16"


@cache
def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies matrices in bfloat16 faster than in float32; False if unknown."""
    try:
        lines = _CPU_INFO.read_text().splitlines()
    except OSError:  # not Linux
        return False
    flags = (line.partition(":")[2].split() for line in lines if line.startswith(_FLAGS))
    return not _BFLOAT16_UNITS.isdisjoint(next(flags, []))


def _cuda_has_bfloat16(device: torch.device) -> bool:
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)
