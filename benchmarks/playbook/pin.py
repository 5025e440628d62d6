"""Which entry of the forward tables runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from clear_dit.kernels.triton import tuning


@contextmanager
def pinned(entry: str | None) -> Iterator[None]:
    """The tables' entry that runs, by name; None is free to choose."""
    before = os.environ.pop(tuning.PIN, None)
    if entry is not None:
        os.environ[tuning.PIN] = entry
    try:
        yield
    finally:
        os.environ.pop(tuning.PIN, None)
        if before is not None:
            os.environ[tuning.PIN] = before
