"""What does not work on a device, remembered for this process and said once."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .device import CaptureError, Kernel, NoEntryError, capturing

logger: logging.Logger = logging.getLogger(__name__)

# Of a kernel without a choice of entries.
ONLY = "only"

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


def blame(error: Exception, device: torch.device) -> str:
    """What an entry is blamed for that raised; errors that are not its fault are raised again.

    Those are a lack of memory, a capture, and a device on which nothing runs any more.
    """
    text = " ".join(f"{type(error).__name__}: {error}".split())
    memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        words in text for words in ("out of memory", "can't allocate memory")
    )
    if memory or isinstance(error, CaptureError) or capturing(device):
        raise error
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            raise error from None
    return f"failed with {text[:300]}"


@contextmanager
def without_choice(kernel: Kernel) -> Iterator[None]:
    """Run a kernel that has one entry; if it fails, now or before, that is `NoEntryError`."""
    if reason := failure(kernel, ONLY):
        raise NoEntryError(f"{kernel}: it {reason}.")
    try:
        yield
    except Exception as error:
        reason = blame(error, kernel.device)
        record_failure(kernel, ONLY, reason)
        raise NoEntryError(f"{kernel}: it {reason}.") from error
