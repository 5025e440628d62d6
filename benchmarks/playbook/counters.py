"""Counters of three kernels: the text's, and the image's at the smallest and the largest radius.

By Nsight Compute where it is there and may read them, else what PyTorch's profiler knows: time,
registers, shared memory and occupancy.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from clear_dit.kernels.triton.ops import triton_attention

from .kernel_times import kernel_times
from .part_file import PartFile
from .pin import pinned
from .production import TEXT_KERNELS
from .setting import FULL, Setting, Task
from .sweep import fastest_entry

SECTIONS = (
    "SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "SchedulerStats",
    "WarpStateStats", "Occupancy", "LaunchStats",
)  # fmt: skip
NCU_SECONDS = 40
# One call at the production shape, in a process of its own.
LAUNCH = "from playbook.counters import launch; launch({radius}, {entry!r})"


def tasks(setting: Setting) -> list[Task]:
    """Kernel by kernel."""
    first, last = setting.radii[0], setting.radii[-1]
    return [
        Task(f"image r={first}", partial(_count, setting, first, False)),
        Task(f"text r={first}", partial(_count, setting, first, True)),
        Task(f"image r={last}", partial(_count, setting, last, False)),
    ]


def _count(setting: Setting, radius: int, text: bool) -> Iterator[dict[str, Any]]:
    wrong = PartFile(setting.folder, "production").read().problems.get(f"r={radius}")
    if wrong is not None:
        yield {"radius": radius, "problem": f"not looked at, for a check failed: {wrong}"}
        return
    entry = fastest_entry(setting, radius)
    with pinned(entry):
        run = _layer(setting, radius)
        # The kernel that takes longest, of the text's or of the others.
        times = {
            name: ms
            for name, ms in kernel_times(run, 1, setting.device).items()
            if name.startswith(TEXT_KERNELS) == text
        }
        kernel = max(times, key=times.__getitem__)
        row = {"radius": radius, "entry": entry, "kernel": kernel}
        counters, reason = _by_ncu(radius, entry, kernel)
        if counters is not None:
            yield row | {"by": "ncu", "counters": counters}
        else:
            yield row | {"by": "torch.profiler", "ncu": reason, "counters": _by_torch(run, kernel)}


def _layer(setting: Setting, radius: int) -> Callable[[], object]:
    window = setting.window(setting.sizes[-1], radius)
    tensors = setting.problem(window).tensors()
    return partial(triton_attention, *tensors, window, scale=setting.head_dim**-0.5)


def launch(radius: int, entry: str) -> None:
    """What Nsight Compute looks at: one call at the production shape."""
    with pinned(entry):
        _layer(FULL(folder=Path()), radius)()


def _by_ncu(radius: int, entry: str, kernel: str) -> tuple[dict[str, str] | None, str | None]:
    """(counters by name and unit, None), or (None, why not)."""
    tool = shutil.which("ncu")
    if tool is None:
        return None, "is not installed"
    sections = [word for name in SECTIONS for word in ("--section", name)]
    # The clocks are left as they are.
    asked = [
        tool, "--clock-control", "none", "--kernel-name", f"regex:^{kernel}", "--launch-count", "1",
        "--csv", "--page", "raw", *sections,
        sys.executable, "-c", LAUNCH.format(radius=radius, entry=entry),
    ]  # fmt: skip
    try:
        done = subprocess.run(
            asked, capture_output=True, text=True, timeout=NCU_SECONDS, env=dict(os.environ)
        )
    except subprocess.TimeoutExpired:
        return None, f"took longer than {NCU_SECONDS} s"
    counters = read_ncu(done.stdout)
    if counters is None:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        return None, f"exit status {done.returncode}: {said[-1][:300] if said else 'said nothing'}"
    return counters, None


def read_ncu(printed: str) -> dict[str, str] | None:
    """Values by "name [unit]" of the first kernel in `--csv --page raw`; None if there is none."""
    lines = printed.splitlines()
    start = next((at for at, line in enumerate(lines) if line.startswith('"ID"')), None)
    rows = [] if start is None else list(csv.reader(lines[start : start + 3]))
    if len(rows) < 3:
        return None
    named = zip(*rows, strict=True)
    return {f"{name} [{unit}]" if unit else name: value for name, unit, value in named}


def _by_torch(run: Callable[[], object], kernel: str) -> dict[str, Any]:
    """What PyTorch's profiler says of a kernel; on a CPU, of the operators."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        found.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    for event in events:
        if event.get("cat") == "kernel" and event["name"].startswith(kernel):
            return {"us": event["dur"], **event["args"]}
    return {"operators": sorted({e["name"] for e in events if e.get("cat") == "cpu_op"})}
