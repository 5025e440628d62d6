"""Which entry of a table runs: the pinned one, the one measured fastest, or the first."""

from __future__ import annotations

import logging
import os
import statistics
from collections.abc import Callable, Hashable, Sequence

import torch

from .tables import ForwardConfig

logger = logging.getLogger(__name__)

# Names one entry, for the same tiles on every rank and run: q8x8-k8x8-d64-w4-s3-tma.
PIN = "CLEAR_DIT_TRITON_FORWARD"
# Entries that are tried; each costs some seconds of compilation on the first call of its kind.
TRIED = 2
REPEATS = 3

# What was measured. The key is a kind of problem, never a resolution, so a new size costs nothing.
_fastest: dict[Hashable, ForwardConfig] = {}


def choose(
    entries: Sequence[ForwardConfig], kind: Hashable, run: Callable[[ForwardConfig], object]
) -> ForwardConfig:
    """The entry to use for a kind of problem.

    Args:
        entries: that fit the device, the default first.
        kind: everything the choice depends on, the resolution not among it.
        run: launches the kernel with an entry, on the problem at hand.

    Raises:
        ValueError: the pin names none of `entries`.
    """
    pinned = os.environ.get(PIN)
    if pinned:
        for entry in entries:
            if entry.name == pinned:
                return entry
        names = ", ".join(entry.name for entry in entries)
        raise ValueError(f"local_attention: {PIN} must be one of {names}; got {pinned!r}.")
    measurable = torch.cuda.is_available() and not torch.cuda.is_current_stream_capturing()
    if len(entries) == 1 or not measurable:
        return entries[0]
    if kind not in _fastest:
        seconds = {entry: _milliseconds(run, entry) for entry in entries[:TRIED]}
        _fastest[kind] = min(seconds, key=seconds.__getitem__)
        measured = ", ".join(f"{entry.name} {ms:.2f} ms" for entry, ms in seconds.items())
        logger.info("triton attention uses %s; measured %s", _fastest[kind].name, measured)
    return _fastest[kind]


def _milliseconds(run: Callable[[ForwardConfig], object], entry: ForwardConfig) -> float:
    run(entry)  # compiles
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run(entry)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)
