"""Run a part's processes until its tasks are done or its time is up, whatever becomes of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from .part_file import PROBLEM, PartFile, Record
from .parts import Part

POLL_SECONDS = 0.1
# A process that was killed may take to end: the device's driver may hold it.
END_SECONDS = 15
NO_TIME = "no time: stopped when the part's time was up"
BENCHMARKS = Path(__file__).parents[1]


@contextmanager
def process(
    arguments: list[str], errors: IO[bytes] | int = subprocess.DEVNULL
) -> Iterator[subprocess.Popen[bytes]]:
    """A Python process in a group of its own, all of which ends with the context."""
    paths = [str(BENCHMARKS), str(BENCHMARKS.parent), os.environ.get("PYTHONPATH")]
    running = subprocess.Popen(
        [sys.executable, *arguments],
        stderr=errors,
        process_group=0,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)},
    )
    try:
        yield running
    finally:
        with suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
        try:
            running.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            print(f"process {running.pid} was killed and does not end; going on", flush=True)


def worker_arguments(name: str, folder: Path, interpret: bool) -> list[str]:
    """Of a process that works for a part."""
    return ["-m", "playbook.worker", name, str(folder), *["--interpret"] * interpret]


def run_part(name: str, part: Part, folder: Path, interpret: bool, deadline: float) -> None:
    """Do what is missing of a part, until a deadline of `time.monotonic`."""
    file = PartFile(folder, name)
    shards = 1 if interpret else part.processes
    common = worker_arguments(name, folder, interpret)
    of_each = [[*common, "--shard", str(shard), "--shards", str(shards)] for shard in range(shards)]
    threads = [
        # A worker ends by itself when this process does.
        threading.Thread(
            target=_run_shard, args=(file, part, shard, arguments, deadline), daemon=True
        )
        for shard, arguments in enumerate(of_each)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _run_shard(
    file: PartFile, part: Part, shard: int, arguments: list[str], deadline: float
) -> None:
    """Start a process again for as long as it dies on a task and there are others left."""
    while time.monotonic() < deadline:
        before = _settled(file.read())
        with tempfile.TemporaryFile() as errors, process(arguments, errors) as running:
            problem = _wait(file, part, shard, running, deadline)
            problem = problem or _death(running.returncode, errors)
        if problem is None:
            return
        task = file.read().running.get(shard)
        if task is not None:
            lost = problem != NO_TIME
            file.append({"event": "failed", "task": task[0], PROBLEM: problem, "lost": lost})
            print(f"{file.path.stem}: {task[0]}: FAILED: {problem}", flush=True)
        elif _settled(file.read()) == before:  # it never came to a task
            file.append({"event": "failed", PROBLEM: problem})
            print(f"{file.path.stem}: FAILED: {problem}", flush=True)
            return


def _settled(record: Record) -> int:
    return len(record.ended) + len(record.failed)


def _wait(
    file: PartFile, part: Part, shard: int, running: subprocess.Popen[bytes], deadline: float
) -> str | None:
    """Until a process ends; why it has to be killed, or None."""
    read, record = -1, Record()
    while running.poll() is None:
        time.sleep(POLL_SECONDS)
        if time.monotonic() > deadline:
            return NO_TIME
        size = file.path.stat().st_size if file.path.exists() else 0
        if size != read:
            read, record = size, file.read()
        task = record.running.get(shard)
        if task is not None and time.time() > task[1] + part.task_seconds:
            return f"took longer than {part.task_seconds:g} s"
    return None


def _death(status: int, errors: IO[bytes]) -> str | None:
    """Why a process ended that should not have; None if it did what it should."""
    if status == 0:
        return None
    how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    errors.seek(0)
    said = [line for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
    return f"{how}: {said[-1][:500]}" if said else how
