"""What the compiled kernels take, and how their work is shared out to threads."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from threading import Thread
from typing import TypeVar

import torch

# A dtype's place is its number in the kernels, which compute in float32.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_HEAD_DIM = 128

Share = TypeVar("Share")
Done = TypeVar("Done")


class Tensor(ctypes.Structure):
    """A tensor as numbers.h has it."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch", "token", "head")),
    )

    @classmethod
    def of(cls, x: torch.Tensor) -> Tensor:
        """x: (batch, tokens, heads, ...), head_dim contiguous; it must outlive the kernel's run."""
        return cls(x.data_ptr(), *x.stride()[:3])


def why_not(x: torch.Tensor) -> str | None:
    """Why the kernels do not take such tokens, (..., head_dim); None if they do."""
    if x.device.type != "cpu":
        return f"needs a CPU, got tokens on {x.device.type!r}"
    if x.dtype not in DTYPES:
        return f"takes float16, bfloat16 or float32, got {x.dtype}"
    if not 1 <= x.shape[-1] <= LARGEST_HEAD_DIM:
        return f"takes a head_dim of 1 to {LARGEST_HEAD_DIM}, got {x.shape[-1]}"
    return None


def by_threads(
    run: Callable[[Share], Done], shares: list[Share], threads: int | None = None
) -> list[Done]:
    """What `run` returns for each share, in any order; by this thread and new ones.

    The new ones end with this call: a process that forks takes no threads along, and an executor's
    refuse to work once the main thread has ended.

    Args:
        threads: at most so many; None for as many as PyTorch takes.
    """
    left = iter(shares)
    count = max(1, min(threads or torch.get_num_threads(), len(shares)))
    found: list[list[Done]] = [[] for _ in range(count)]
    errors: list[BaseException] = []

    def work(own: list[Done]) -> None:
        try:
            own.extend(map(run, left))
        except BaseException as error:
            errors.append(error)

    others = []
    try:
        for own in found[1:]:
            thread = Thread(target=work, args=(own,))
            thread.start()
            others.append(thread)
        work(found[0])
    finally:  # they write to memory of the caller's
        for thread in others:
            thread.join()
    if errors:
        raise errors[0]
    return [each for own in found for each in own]


def share_of(whole: int, wanted: int, step: int) -> int:
    """What a thread takes at a time, in whole steps: as wanted, but some for every thread."""
    share = min(wanted, math.ceil(whole / torch.get_num_threads()))
    return max(1, math.ceil(share / step)) * step
