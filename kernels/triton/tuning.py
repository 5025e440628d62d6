"""Which entry of a table runs: the pinned one, the one measured fastest, or the first that works.

An entry that fails where another works only costs a warning. What was measured is kept on disk, so
that it is measured once for a machine, and by size: a small image's time is the host's.
"""

from __future__ import annotations

import logging
import os
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch

from . import on_disk
from .device import Kernel, NoEntryError, capturing
from .failures import blame, failure
from .geometry import Tiling
from .trust import why_not_entry

logger: logging.Logger = logging.getLogger(__name__)

# Names one entry, for the same tiles on every rank and run: q8x8-k8x8-d64-w4-s3-tma.
PIN = "CLEAR_DIT_TRITON_FORWARD"
# Entries that are measured; each costs some seconds of compilation on the first call of its kind.
TRIED = 3
REPEATS = 3
# Below, the host bounds what is measured: the default runs.
LEAST_MILLISECONDS = 1.0


class Entry(Protocol):
    """Of a table of forward kernels, see tables.py."""

    @property
    def name(self) -> str: ...
    @property
    def tiling(self) -> Tiling: ...
    @property
    def descriptor(self) -> bool: ...


E = TypeVar("E", bound=Entry)


class Kind(NamedTuple):
    """What one measurement stands for.

    Attributes:
        kernel: which runs, on which device.
        radius: in tokens.
        text: whether there is text.
        size: of the problem, see `size_class`.
    """

    kernel: Kernel
    radius: int
    text: bool
    size: int


def size_class(queries: int) -> int:
    """The power of two that holds the query rows of all heads and batch items."""
    return queries.bit_length()


_fastest: dict[Kind, str] = {}
# Why entries that were right when they were looked at cannot take a kind of problem.
_unfit: dict[tuple[Kind, str], str] = {}
_kept = on_disk.Kept("clear-dit-fastest.json")


def pinned(entries: Sequence[E], readable: bool) -> E | None:
    """The entry that CLEAR_DIT_TRITON_FORWARD names, or its twin that reads by pointers.

    Args:
        entries: of the device, for this kind of problem.
        readable: whether tensor descriptors can read the keys and values.

    Returns:
        None where nothing is pinned.

    Raises:
        ValueError: the pin names none of `entries`, or cannot read these keys and has no twin.
    """
    name = os.environ.get(PIN)
    if not name:
        return None
    found = next((entry for entry in entries if entry.name == name), None)
    if found is None:
        names = ", ".join(entry.name for entry in entries)
        raise ValueError(f"local_attention: {PIN} must be one of {names}; got {name!r}.")
    if readable or not found.descriptor:
        return found
    for entry in entries:
        alike = type(entry) is type(found) and entry.tiling == found.tiling
        if alike and not entry.descriptor:
            return entry
    raise ValueError(
        f"local_attention: {PIN}={name} reads keys and values by tensor descriptor, which needs "
        "strides of whole 16 bytes and an aligned start; give contiguous ones, or pin another."
    )


def run_pinned(entry: E, kernel: Kernel, run: Callable[[E], object]) -> None:
    """`run` with a pinned entry, which nothing replaces.

    Raises:
        RuntimeError: it was found wrong on this device.
    """
    reason = why_not_entry(kernel, entry.name)
    if reason is not None:
        raise RuntimeError(f"local_attention: {PIN}={entry.name} cannot run: it {reason}.")
    run(entry)


def run_fastest(entries: Sequence[E], kind: Kind, run: Callable[[E], object]) -> None:
    """`run` with the best entry for a kind of problem that works.

    Args:
        entries: that can take the problem, the default first.
        kind: everything the choice depends on.
        run: launches the kernel with an entry, on the problem at hand.

    Raises:
        NoEntryError: all failed; errors that are no entry's fault are passed on.
    """
    while left := [entry for entry in entries if _why_not(entry, kind) is None]:
        entry = _choose(left, kind, run)
        if entry is not None and _works(entry, kind, run):
            return
    reasons = "; ".join(f"{entry.name} {_why_not(entry, kind)}" for entry in entries)
    raise NoEntryError(f"{kind.kernel}: no entry of the tables runs: {reasons or 'there is none'}.")


def _why_not(entry: E, kind: Kind) -> str | None:
    return _unfit.get((kind, entry.name)) or failure(kind.kernel, entry.name)


def _choose(entries: Sequence[E], kind: Kind, run: Callable[[E], object]) -> E | None:
    """The remembered or measured winner, or the default; None if one failed meanwhile."""
    default = entries[0]
    device = kind.kernel.device
    if len(entries) == 1 or device.type != "cuda":
        return default
    if kind not in _fastest:
        _fastest[kind] = _kept.get(_key(kind)) or ""
    known = {entry.name: entry for entry in entries}
    if _fastest[kind] in known:
        return known[_fastest[kind]]
    if capturing(device):
        return default
    milliseconds = {}
    for entry in entries[:TRIED]:
        if not _works(entry, kind, run):
            return None
        milliseconds[entry.name] = _milliseconds(run, entry)
        if milliseconds[default.name] < LEAST_MILLISECONDS:
            _fastest[kind] = default.name  # in this process, and of this size
            return default
    winner = min(milliseconds, key=milliseconds.__getitem__)
    _fastest[kind] = winner
    _kept.keep(_key(kind), winner)
    measured = ", ".join(f"{name} {ms:.2f} ms" for name, ms in milliseconds.items())
    logger.info("%s uses %s; measured %s", kind.kernel, winner, measured)
    return known[winner]


def _works(entry: E, kind: Kind, run: Callable[[E], object]) -> bool:
    if why_not_entry(kind.kernel, entry.name) is not None:
        return False
    try:
        run(entry)
    except Exception as error:
        reason = blame(error, kind.kernel.device)
        logger.warning("%s does without entry %s: it %s", kind.kernel, entry.name, reason)
        _unfit[kind, entry.name] = reason
        return False
    return True


def _milliseconds(run: Callable[[E], object], entry: E) -> float:
    """Median of runs of a compiled entry."""
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run(entry)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def _key(kind: Kind) -> str:
    kernel = kind.kernel
    device = torch.cuda.get_device_name(kernel.device)
    about = device, str(kernel.dtype), kernel.head_dim, kernel.name, kernel.group
    return on_disk.name(*about, kind.radius, kind.text, kind.size)
