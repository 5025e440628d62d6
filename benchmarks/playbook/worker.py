"""A process that does the tasks of a part which nobody has done: `python -m playbook.worker ...`.

What it finds it writes to the part's file as it comes, so that nothing is lost with it.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import sys
import threading
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from .part_file import PROBLEM, PartFile, lost_alone
from .parts import CHOSEN, PARTS

# After them the next task needs a fresh process.
DEVICE_ERRORS = (
    "CUDA error", "Triton Error [CUDA]", "HIP error", "illegal memory access", "device-side assert",
)  # fmt: skip


def environment(interpreted: bool) -> dict[str, Any]:
    """Hardware and software."""
    import torch
    import triton

    from clear_dit.bench.timing import hardware

    device = torch.device("cpu" if interpreted else "cuda")
    return {
        "hardware": hardware(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
        "interpreted": interpreted,
    }


def work(
    part: str, folder: Path, interpret: bool, shard: int, shards: int, ahead: bool = False
) -> int:
    """Every `shards`-th task, or what the part compiles ahead; the exit status.

    It is not 0 where what is left needs another process.
    """
    import torch

    from .setting import FULL, SMOKE

    module = import_module(f".{part}", __package__)
    setting = (SMOKE if interpret else FULL)(folder=folder)
    if ahead:
        module.compile_ahead(setting)
        return 0
    file = PartFile(folder, part)
    tasks = module.tasks(setting)
    record = file.read()
    labels = [task.label for task in tasks]
    if labels != record.labels:
        file.append({"event": "tasks", "labels": labels, "environment": environment(interpret)})
    tried = record.ended | record.failed.keys()
    left = [task for task in tasks[shard::shards] if task.label not in tried]
    # What failed before may cost as much again.
    left.sort(key=lambda task: (task.label.startswith(CHOSEN), task.label in record.failed_before))
    alone = None  # whether what this process has done was
    for task in left:
        if task.alone and (reason := lost_alone(folder)):
            _fail(file, task.label, f"not tried: {reason}")
            continue
        if alone not in (None, task.alone):
            return 1
        alone = task.alone
        begin = {"event": "begin", "task": task.label, "shard": shard, "at": time.time()}
        file.append(begin | {"alone": alone})
        try:
            for row in task.run():
                file.append({"task": task.label, **row})
                if PROBLEM in row or not PARTS[part].quiet:
                    print(_line(part, task.label, row), flush=True)
        except Exception as error:
            lost = any(sign in str(error) for sign in DEVICE_ERRORS)
            _fail(file, task.label, f"{type(error).__name__}: {error}"[:1000], lost)
            if lost:
                return 1
        else:
            file.append({"event": "end", "task": task.label})
        if not interpret:
            torch.cuda.empty_cache()
    return 0


def _fail(file: PartFile, task: str, problem: str, lost: bool = False) -> None:
    file.append({"event": "failed", "task": task, PROBLEM: problem, "lost": lost})
    print(f"{file.path.stem}: {task}: FAILED: {problem}", flush=True)


def _line(part: str, label: str, row: dict[str, Any]) -> str:
    shown = " ".join(f"{key}={_short(value)}" for key, value in row.items() if value is not None)
    return f"{part}: {label}: {shown}"[:600]


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return ",".join(f"{key}:{_short(each)}" for key, each in value.items())
    return f"{value:.4g}" if isinstance(value, float) else value


def _end_with(parent: int) -> None:
    """End this process with the one that started it, which may be killed without a word."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> int:
    parser = argparse.ArgumentParser(description="Do the tasks of one part.")
    parser.add_argument("part")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--interpret", action="store_true")
    parser.add_argument("--shard", type=int, default=0)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--ahead", action="store_true", help="only compile what takes long")
    options = parser.parse_args()
    _end_with(os.getppid())
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    # Which path runs, and which entry of the tables is chosen.
    logging.getLogger("clear_dit").setLevel(logging.INFO)
    return work(**vars(options))


if __name__ == "__main__":
    sys.exit(main())
