"""Compile launches ahead of time for GPUs that are not there, and read what they need.

    with compile_only("sm_90") as kernels:
        image_attention(...)  # meta tensors will do
    print([usage(kernel) for kernel in kernels])

Within the context a launch compiles exactly what it would run and runs nothing. Not for a process
in interpreter mode.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from .disassembly import Loop, loop_spills, loops

TARGETS: dict[str, GPUTarget] = {
    **{f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 86, 89, 90, 100, 120)},
    **{arch: GPUTarget("hip", arch, 64) for arch in ("gfx942", "gfx950")},
}


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel needs.

    Attributes:
        registers: of a thread.
        stack: bytes of a thread, in local memory.
        loop_spills: loads and stores of local memory inside loops, where they cost time.
        shared: bytes of shared memory of a program.
        wgmma: Hopper's warp-group products are used.
        buffers: of every shape that loops copy ahead, such as 64x128xbf16, how many there are at a
            time, in the loop that has fewest.
        loops: the innermost ones, NVIDIA only.
    """

    name: str
    registers: int
    stack: int
    loop_spills: int
    shared: int
    wgmma: bool
    buffers: dict[str, int]
    loops: list[Loop]


@contextmanager
def compile_only(target: str) -> Iterator[list[Any]]:
    """Make launches compile for a target of TARGETS; yields the list the kernels come to."""
    kernels: list[Any] = []
    stub = SimpleNamespace(
        get_current_device=lambda: target,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: TARGETS[target],
    )
    run, active = JITFunction.run, driver._active

    def compile_launch(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        kernels.append(kernel)
        return kernel

    JITFunction.run = compile_launch
    driver.set_active(stub)
    try:
        yield kernels
    finally:
        JITFunction.run = run
        driver._active = active


def usage(kernel: Any) -> Usage:
    """Registers, stack, spills and shared memory of a kernel compiled by `compile_only`."""
    found: list[Loop] = []
    if "cubin" in kernel.asm:
        registers, stack, listing = _nvidia(kernel.asm["cubin"])
        spills, found = loop_spills(listing), loops(listing)
    else:
        registers, stack, spills = _amd(kernel.asm["amdgcn"])
    return Usage(
        kernel.name,
        registers,
        stack,
        spills,
        kernel.metadata.shared,
        "wgmma.mma_async" in kernel.asm.get("ptx", ""),
        _buffers(kernel.asm["ttgir"]),
        found,
    )


def _buffers(code: str) -> dict[str, int]:
    """Allocations without a first value in Triton's own code: their first size is a count."""
    found = re.findall(r"ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x([^,]+),", code)
    return {shape: min(int(n) for n, of in found if of == shape) for _, shape in found}


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def _nvidia(cubin: bytes) -> tuple[int, int, str]:
    """Registers, stack, and the disassembly."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        found = re.search(r"REG:(\d+) STACK:(\d+)", _tool("cuobjdump", "-res-usage", file.name))
        assert found is not None
        return int(found[1]), int(found[2]), _tool("nvdisasm", "-c", file.name)


def _amd(listing: str) -> tuple[int, int, int]:
    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", listing)
        assert found is not None, name
        return int(found[1])

    return field("vgpr_count"), field("private_segment_fixed_size"), field("vgpr_spill_count")
