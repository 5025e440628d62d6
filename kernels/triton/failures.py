"""What does not work on a device, remembered for this process and said once."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .device import Kernel, NoEntryError

logger = logging.getLogger(__name__)

# Of a kernel without a choice of entries.
ONLY = "only"
# Of errors after which nothing runs on the device any more.
LOST = ("CUDA error", "HIP error", "illegal memory access", "launch failure", "misaligned address")

_lock = threading.Lock()
_failed: dict[tuple[Kernel, str], str] = {}


def failure(kernel: Kernel, entry: str) -> str | None:
    """Why an entry of a kernel's table is not used; None if nothing is known against it."""
    return _failed.get((kernel, entry))


def record_failure(kernel: Kernel, entry: str, reason: str) -> None:
    """Do not use an entry any more, and say so once."""
    with _lock:
        known = (kernel, entry) in _failed
        _failed[kernel, entry] = reason
    if not known:
        logger.warning("%s, entry %s, is not used: it %s", kernel, entry, reason)


def of_entry(error: Exception) -> str:
    """What is wrong with an entry that raised; errors that are not its fault are raised again."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    if isinstance(error, torch.OutOfMemoryError) or any(word in text for word in LOST):
        raise error
    return f"failed with {text[:300]}"


@contextmanager
def without_choice(kernel: Kernel) -> Iterator[None]:
    """Run a kernel that has one entry; if it fails, now or before, that is `NoEntryError`."""
    if reason := failure(kernel, ONLY):
        raise NoEntryError(f"{kernel}: it {reason}.")
    try:
        yield
    except Exception as error:
        reason = of_entry(error)
        record_failure(kernel, ONLY, reason)
        raise NoEntryError(f"{kernel}: it {reason}.") from error
