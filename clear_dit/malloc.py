"""What a process on a CPU does with memory that tensors leave."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

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
    mallopt = _of_glibc("mallopt")
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, _LARGEST)


def give_back_freed_memory() -> None:
    """Let the system have what is free of this process's memory, of all its threads.

    After something large that is rare: memory that one thread freed is not there for another.
    """
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _of_glibc(name: str) -> Any:
    """A function of the C library; None where it has none of this name."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
