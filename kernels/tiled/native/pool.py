"""The cells of far keys by a compiled kernel, on a CPU: see pool.cpp."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from ...cells import cell_count
from ...opaque import channels_contiguous
from .build import load_for
from .shares import DTYPES, Tensor, by_threads, why_not

# Rows of cells that a thread takes at a time; levels of no more are not worth a thread.
SHARE_ROWS = 16


class _Problem(ctypes.Structure):
    _fields_ = (
        *(
            (name, Tensor)
            for name in (
                *("key", "value", "cell_key", "cell_value"),
                *("largest", "mass", "cell_largest", "cell_mass"),
            )
        ),
        *((name, ctypes.c_int32) for name in ("dtype", "are_tokens", "rows", "columns")),
        ("scale", ctypes.c_float),
        ("learned", ctypes.c_float * 4),
    )


# What the kernel takes: a problem, a batch item, a head, first row of cells, the one after.
ARGUMENTS = (
    *(ctypes.POINTER(_Problem), ctypes.c_int64, ctypes.c_int64),
    *(ctypes.c_int, ctypes.c_int),
)


@functools.cache
def _library(head_dim: int) -> ctypes.CDLL | str:
    """The kernel for a head_dim, or why there is none. Compiled once per machine: a second."""
    source = Path(__file__).with_suffix(".cpp")
    return load_for(head_dim, source, "pool_share", ARGUMENTS, None)


def why_not_pooled(key: torch.Tensor) -> str | None:
    """Why the kernel does not pool such keys; None if it does."""
    reason = why_not(key)
    if reason is not None:
        return reason
    library = _library(key.shape[-1])
    return library if isinstance(library, str) else None


def pool_cells(
    key: torch.Tensor,
    value: torch.Tensor,
    weight: torch.Tensor,
    height: int,
    width: int,
    levels: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`pooling.pool_cells` of float16, bfloat16 or float32, any strides; summed in float32.

    Args:
        weight: (levels, 2, 2); (0, 2, 2) stands for 1 / 4 each.
    """
    key, value = channels_contiguous(key, value)
    batch, _, heads, head_dim = key.shape
    library = _library(head_dim)
    assert isinstance(library, ctypes.CDLL), library
    # The kernel believes these numbers.
    assert (key.shape, key.dtype) == (value.shape, value.dtype)
    assert key.shape[1] == height * width
    sizes = [(cell_count(height, level), cell_count(width, level)) for level in range(levels + 1)]
    cells = sum(rows * columns for rows, columns in sizes[1:])
    # Of all levels: key, value, largest and mass.
    made = [
        key.new_empty(batch, cells, heads, *channels, dtype=torch.float32)
        for channels in ([head_dim], [head_dim], [], [])
    ]
    below, start = [key, value, *made[2:]], 0
    for level in range(1, levels + 1):
        rows, columns = sizes[level]
        own = [x[:, start : start + rows * columns] for x in made]
        learned = (4 * weight[level - 1]).flatten().tolist() if len(weight) else [1.0] * 4
        problem = _Problem(
            *(Tensor.of(x) for x in (*below[:2], *own[:2], *below[2:], *own[2:])),
            DTYPES.index(below[0].dtype), level == 1, *sizes[level - 1],
            scale, (ctypes.c_float * 4)(*learned),
        )  # fmt: skip
        shares = [
            (item, head, first, min(first + SHARE_ROWS, rows))
            for first in range(0, rows, SHARE_ROWS)
            for item in range(batch)
            for head in range(heads)
        ]

        def run(share: tuple[int, int, int, int], problem: _Problem = problem) -> None:
            library.pool_share(problem, *share)

        by_threads(run, shares, None if rows > SHARE_ROWS else 1)
        below, start = own, start + rows * columns
    return made[0].to(key.dtype), made[1].to(key.dtype)
