"""Generating one job into a folder: the image, its sidecar, and what the manifest says of it."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from pathlib import Path

import torch

from ..errors import RequestError, first_line
from ..generation.runner import PipelineRunner, Step
from ..versions import __version__
from .images import complete_sidecar, finished, write_sidecar
from .jobs import Job
from .manifest import DONE, FAILED, Entry, entry_of

logger: logging.Logger = logging.getLogger(__name__)

# What a job's settings or the machine's limits lead to; anything else is a fault of the program.
_EXPECTED = (RequestError, OSError, FloatingPointError, MemoryError)
_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def generate_job(
    runner: PipelineRunner, folder: Path, job: Job, on_step: Callable[[Step], None] | None = None
) -> Entry:
    """Generate a job that this process has claimed.

    Args:
        runner: of the request's model.
        folder: where image and sidecar go.
        job: what to generate.
        on_step: see `PipelineRunner.generate`.

    Returns:
        For the manifest: done, or failed with the error, which is logged too.

    Raises:
        OSError: the disk is full or the device broken, so that no other job can be done either.
    """
    notes = {"id": job.name, "job": job.identity}
    try:
        result = runner.generate(job.request, folder / job.image, on_step=on_step, notes=notes)
    except Exception as error:
        if isinstance(error, torch.AcceleratorError):
            raise OSError(f"{job.name}: the device failed: {first_line(error)}") from error
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in _DISK_IS_FULL:
            raise
        return failed(job, error)
    settings = job.request.settings | {"version": __version__, "impl": result["impl"]} | notes
    if result["quantised"] is not None:
        settings["quantised"] = result["quantised"]
    more = {key: result[key] for key in ("seconds", "peak_memory_mb")}
    write_sidecar(folder, job, settings, **more)
    return entry_of(job, DONE, seconds=result["seconds"]["total"])


def finished_before(folder: Path, job: Job) -> Entry | None:
    """For the manifest, where a job's image is there or its name taken; None where it is not.

    Raises:
        OSError: the sidecar is missing and cannot be written.
    """
    try:
        settings = finished(folder, job)
    except RequestError as error:
        return failed(job, error)
    if settings is None:
        return None
    return entry_of(job, DONE, **complete_sidecar(folder, job, settings))


def failed(job: Job, error: Exception) -> Entry:
    """What the manifest says of a job that failed; the log says it too."""
    reason = first_line(error)
    unexpected = not isinstance(error, _EXPECTED)
    if unexpected:
        reason = f"{type(error).__name__}: {reason}"
    logger.error("%s (line %d) failed: %s", job.name, job.line, reason, exc_info=unexpected)
    return entry_of(job, FAILED, error=reason)
