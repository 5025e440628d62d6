"""Counters of the image's and of the text's kernel at the smallest radius.

By Nsight Compute where it is there and may read them, else what PyTorch's profiler knows: time,
registers, shared memory and occupancy.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from clear_dit.kernels.triton.ops import triton_attention

from .entries import chosen_entry
from .part_file import PartFile
from .pin import pinned
from .right import checked
from .setting import FULL, Setting, Task

SECTIONS = (
    "SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "SchedulerStats",
    "WarpStateStats", "Occupancy", "LaunchStats",
)  # fmt: skip
NCU_SECONDS = 40
# Where its package puts it, if not on PATH.
NCU = "opt/nvidia/nsight-compute/*/ncu"
# The kernel of the image has this name in Triton and in Gluon.
KERNELS = ("image_forward", "text_forward")
# One call at the production shape, in a process of its own.
LAUNCH = "from playbook.counters import launch; launch({radius}, {entry!r})"


def tasks(setting: Setting) -> list[Task]:
    """Both kernels at once: a process that Nsight Compute watches takes long to start."""
    radius = setting.radii[0]
    return [Task(f"r={radius}", partial(_count, setting, radius))]


def _count(setting: Setting, radius: int) -> Iterator[dict[str, Any]]:
    entry = chosen_entry(setting, radius)
    row: dict[str, Any] = {"radius": radius, "entry": entry}
    with pinned(entry):
        wrong = PartFile(setting.folder, "production").read().problems.get(f"r={radius}")
        window = setting.window(setting.sizes[-1], radius)
        tensors = setting.problem(window).tensors()
        run = partial(triton_attention, *tensors, window, scale=setting.head_dim**-0.5)
        if wrong is None:
            *_, wrong = checked(run, tensors, window)
        if wrong is not None:
            yield row | {"problem": f"not looked at, for a check failed: {wrong}"}
            return
        found, reason = _by_ncu(radius, entry)
        for kernel in KERNELS:
            if found is not None and kernel in found:
                yield row | {"kernel": kernel, "by": "ncu", "counters": found[kernel]}
            else:
                known = {"by": "torch.profiler", "ncu": reason, "counters": _by_torch(run, kernel)}
                yield row | {"kernel": kernel} | known


def launch(radius: int, entry: str) -> None:
    """What Nsight Compute looks at: one call at the production shape."""
    signal.alarm(NCU_SECONDS)  # ends this process, whoever else has ended
    setting = FULL(folder=Path())
    window = setting.window(setting.sizes[-1], radius)
    with pinned(entry):
        triton_attention(*setting.problem(window).tensors(), window, scale=setting.head_dim**-0.5)


def _by_ncu(radius: int, entry: str) -> tuple[dict[str, dict[str, str]] | None, str | None]:
    """(counters by kernel, then by name and unit, None), or (None, why not)."""
    tool = find_ncu(Path("/"))
    if tool is None:
        return None, "is not installed"
    sections = [word for name in SECTIONS for word in ("--section", name)]
    # The clocks are left as they are.
    asked = [
        tool, "--clock-control", "none", "--kernel-name", f"regex:^({'|'.join(KERNELS)})",
        "--launch-count", str(len(KERNELS)), "--csv", "--page", "raw", *sections,
        sys.executable, "-c", LAUNCH.format(radius=radius, entry=entry),
    ]  # fmt: skip
    process = subprocess.Popen(
        asked, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=NCU_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # what it watches is on the device
        process.communicate()
        return None, f"took longer than {NCU_SECONDS} s"
    counters = read_ncu(out)
    if not counters:
        said = [line for line in (out + err).splitlines() if line.strip()]
        return None, f"exit status {process.returncode}: {said[-1][:300] if said else 'no word'}"
    return counters, None


def find_ncu(root: Path) -> str | None:
    """Nsight Compute on PATH, or the newest under `root`."""
    return shutil.which("ncu") or max(map(str, root.glob(NCU)), default=None)


def read_ncu(printed: str) -> dict[str, dict[str, str]]:
    """Of `--csv --page raw`: by kernel, values by "name [unit]"; empty if there are none."""
    lines = printed.splitlines()
    start = next((at for at, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    names, units, *rows = [*csv.reader(lines[start:]), [], []]
    named = [f"{name} [{unit}]" if unit else name for name, unit in zip(names, units, strict=False)]
    found = [dict(zip(named, row, strict=True)) for row in rows if len(row) == len(named)]
    return {
        kernel: row
        for row in found
        for kernel in KERNELS
        if row.get("Kernel Name", "").startswith(kernel)
    }


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
