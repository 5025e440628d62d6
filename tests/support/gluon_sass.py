"""The Hopper kernel compiled ahead of time, for a process of its own that does not interpret."""

from __future__ import annotations

import re
import subprocess
from dataclasses import asdict
from pathlib import Path


def compiled(head_dim: int, pooled: int, folder: Path) -> tuple[dict, list[str]]:
    """What the kernel needs (`Usage`), and its instructions, for bfloat16 and all else as is usual.

    pooled: pooled keys, with a bias. folder: for the binary.
    """
    import torch
    import triton

    from clear_dit.kernels.opaque import Geometry
    from clear_dit.kernels.triton.compile import compile_only, usage
    from clear_dit.kernels.triton.gluon.launch import gluon_attention
    from clear_dit.kernels.triton.tables import GLUON

    x = torch.empty((1, 512 + 64 * 64, 24, head_dim), dtype=torch.bfloat16, device="meta")
    cells, bias = x[:, :pooled], torch.empty(pooled, 24, device="meta")
    lse = torch.empty(x.shape[:3], device="meta")
    geometry = Geometry(64, 64, 512, 8, head_dim**-0.5, 0, 64)
    with compile_only("sm_90") as kernels:
        gluon_attention(x, x, x, cells, cells, bias, x, lse, geometry, GLUON["sm_90"][0])
    (folder / "cubin").write_bytes(kernels[0].asm["cubin"])
    command = [
        Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm",
        "-c",
        folder / "cubin",
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    found = [re.search(r"\b((BRA|HGMMA|MUFU|WARPGROUP|USETMAXREG)\b.*)", line) for line in lines]
    return asdict(usage(kernels[0])), [match[1] for match in found if match]


def under_way(instructions: list[str]) -> list[tuple[int, int]]:
    """Of every run of products: how many, and how many exponentials are between them.

    A run ends where a group waits for its products.
    """
    runs, products, exponentials, between = [], 0, 0, 0
    for name in instructions:
        if name.startswith("HGMMA"):
            products, between, exponentials = products + 1, between + exponentials, 0
        elif name.startswith("MUFU.EX2") and products:
            exponentials += 1
        elif name.startswith("WARPGROUP.DEPBAR"):
            runs.append((products, between))
            products, exponentials, between = 0, 0, 0
    return runs
