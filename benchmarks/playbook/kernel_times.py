"""How long each kernel takes that a call launches, whatever launches it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

# The device is kept busy for so many cycles, until the host is ahead of it.
HEAD_START_CYCLES = 20_000_000


class _EventClock:
    """Milliseconds between two places of the current stream."""

    def __init__(self) -> None:
        self.marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def start(self) -> None:
        self.marks[0].record()

    def stop(self) -> None:
        self.marks[1].record()

    def milliseconds(self) -> float:
        self.marks[1].synchronize()
        return self.marks[0].elapsed_time(self.marks[1])


class _HostClock:
    def start(self) -> None:
        self.begin = time.perf_counter()

    def stop(self) -> None:
        self.end = time.perf_counter()

    def milliseconds(self) -> float:
        return (self.end - self.begin) * 1e3


@contextmanager
def _clocked(clock: type, clocks: dict[str, list[Any]]) -> Iterator[None]:
    """Every launch of a Triton or Gluon kernel between the marks of a new clock."""
    kinds = (JITFunction, InterpretedFunction)
    originals = [kind.run for kind in kinds]

    def clocked(original: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: Any, *arguments: Any, **options: Any) -> Any:
            new = clock()
            new.start()
            result = original(self, *arguments, **options)
            new.stop()
            clocks.setdefault(self.fn.__name__, []).append(new)
            return result

        return run

    for kind, original in zip(kinds, originals, strict=True):
        kind.run = clocked(original)
    try:
        yield
    finally:
        for kind, original in zip(kinds, originals, strict=True):
            kind.run = original


def kernel_times(run: Callable[[], object], repeats: int, device: torch.device) -> dict[str, float]:
    """Median milliseconds of a call by kernel, in the order of their first launches.

    The host runs ahead, so that the time between two launches is the kernel's. On a CPU it is the
    interpreter's.
    """
    clock = _EventClock if device.type == "cuda" else _HostClock
    run()  # compiles
    calls: list[dict[str, list[Any]]] = []
    if device.type == "cuda":
        torch.cuda._sleep(HEAD_START_CYCLES)
    for _ in range(repeats):
        calls.append({})
        with _clocked(clock, calls[-1]):
            run()
    return {
        name: statistics.median(sum(each.milliseconds() for each in call[name]) for call in calls)
        for name in calls[0]
    }
