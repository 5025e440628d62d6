"""What a process on a CPU does with memory that tensors leave."""

from __future__ import annotations

import ctypes
import os
import sys

# Parameters of mallopt, see malloc.h, and the largest value it takes.
_TRIM_THRESHOLD, _MMAP_MAX, _LARGEST = -1, -4, 2**31 - 1


def keep_freed_memory() -> None:
    """Let this process use freed memory again, instead of giving it back and asking anew.

    A large tensor otherwise comes from the system, zeroed, and goes back to it, which is a third
    of a forward's time, and of decoding (demo, 4096 and 2048 px, two cores with AVX2). Memory that
    is free stays the process's own. Where the C library is not glibc nothing changes. For a
    program's start, before the first tensor.
    """
    # PyTorch reads this at its first allocation: large pages save page faults on Linux.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, _LARGEST)
