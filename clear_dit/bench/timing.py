"""Medians of runs taken in turn, and what they were measured on."""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping

import torch

# Seconds that one measurement on a CUDA device should take at least.
MEASURED = 0.01
# Half a millisecond or so: a CUDA device begins that much after the host, for which it then need
# not wait at the first launch.
HEAD_START_CYCLES = 1_000_000


def time_in_turn(
    runs: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, float]:
    """Median seconds of each run, warmed up once; one of each per round, so that drift hits all.

    On a CUDA device by events, over as many calls in a row as fill MEASURED: what the device needs
    where the host keeps ahead of it, as it does in a model.
    """
    warm = {name: _seconds(run, 1, device) for name, run in runs.items()}
    calls = dict.fromkeys(runs, 1)
    if device.type == "cuda":
        calls = {name: max(1, min(100, math.ceil(MEASURED / warm[name]))) for name in runs}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            seconds[name].append(_seconds(run, calls[name], device))
    return {name: statistics.median(values) for name, values in seconds.items()}


def _seconds(run: Callable[[], object], calls: int, device: torch.device) -> float:
    """Mean seconds of `calls` calls in a row."""
    if device.type != "cuda":
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - begin) / calls
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    with torch.cuda.device(device):
        torch.cuda._sleep(HEAD_START_CYCLES)
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def measured_on(dtype: torch.dtype, device: torch.device) -> dict[str, str]:
    """What a result was measured in and on, for its JSON."""
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "hardware": hardware(device),
        "torch": torch.__version__,
    }


def hardware(device: torch.device) -> str:
    """Name of what the numbers were measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {torch.get_num_threads()} threads"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
