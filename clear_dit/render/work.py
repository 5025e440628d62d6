"""Generating what is left of some jobs in a folder, beside other processes that do the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..generation.request import GenerateRequest
from ..generation.runner import PipelineRunner
from .claims import Claims
from .images import complete_sidecar, finished
from .jobs import Job
from .launch import Launch
from .manifest import (
    DONE,
    FAILED,
    REMOVED,
    WAITING,
    Entry,
    Manifest,
    entry_of,
    of_another_file,
    refuse_anothers,
    says,
)
from .one_job import failed, finished_before, generate_job
from .progress import Progress
from .stopping import Stop

# Seconds between two looks at what other processes do.
POLL = 0.5


class Work:
    """The jobs of one process: which are settled, and which are left.

    Args:
        folder: of the images.
        claims, manifest: of that folder.
        make_runner: of a request; called when the first image is to be generated.
        stop: asked between images.
        progress: told of every job.
        launch: this process among others, which begin elsewhere in the list.

    Attributes:
        settled: what became of jobs, DONE or FAILED, by name.
        pending: the others, by name, in the order in which they will be generated.
        generated: how many images this process generated.
    """

    def __init__(
        self,
        folder: Path,
        claims: Claims,
        manifest: Manifest,
        make_runner: Callable[[GenerateRequest], PipelineRunner],
        stop: Stop,
        progress: Progress,
        launch: Launch,
    ) -> None:
        self._folder, self._claims, self._manifest = folder, claims, manifest
        self._make_runner, self._stop = make_runner, stop
        self._progress, self._launch = progress, launch
        self._runner: PipelineRunner | None = None
        self._jobs: dict[str, Job] = {}
        self.settled: dict[str, str] = {}
        self.pending: dict[str, Job] = {}
        self.generated: int = 0

    def take(self, jobs: list[Job], alone: bool) -> list[str]:
        """Make these the jobs, in the manifest too; what is generated already counts as done.

        Args:
            jobs: all of them; others that were taken before are left.
            alone: no other process is present: the manifest begins anew, but for other files.

        Returns:
            Why jobs could not be taken, by line. At the beginning no job is taken then.
        """
        told = self._manifest.entries()
        found, errors = {}, []
        for job in jobs:
            try:
                if self._is_known(job):
                    continue
                refuse_anothers(job, told.get(job.name), self._manifest.file, self._folder)
                if not alone and job.name not in self._jobs:
                    _refuse_at_work(job, told.get(job.name))
                found[job.name] = finished(self._folder, job)
            except RequestError as error:
                errors.append(f"line {job.line}: {error}")
        if errors and not self._jobs:
            return errors
        taken = {job.name: job for job in jobs if self._is_known(job) or job.name in found}
        left = [job for name, job in self._jobs.items() if name not in taken]
        self._record(taken, left, found, told, alone)
        self._jobs = taken
        pending = [job for job in taken.values() if job.name not in self.settled]
        self.pending = {job.name: job for job in _ordered(pending, self._launch)}
        self._progress.restart(
            [job.request for job in taken.values() if job.name in self.settled],
            [job.request for job in pending],
        )
        return errors

    def run(self, until: Callable[[], bool]) -> None:
        """Generate what nobody else does, until all jobs are settled or somebody asks to end.

        A job that another process has claimed is waited for, and generated here if its owner dies.

        Args:
            until: asked between images too.

        Raises:
            RequestError: the model cannot be loaded.
            OSError: the disk is full, or the device broken; no job could be generated any more.
        """
        while self.pending and not self._stop.asked:
            before = len(self.pending)
            for job in list(self.pending.values()):
                if self._stop.asked or until():
                    return
                self._hear()
                if job.name in self.pending:
                    self._try(job)
            if len(self.pending) == before:
                self._stop.sleep(POLL)

    def _is_known(self, job: Job) -> bool:
        known = self._jobs.get(job.name)
        return known is not None and known.identity == job.identity

    def _record(
        self,
        taken: dict[str, Job],
        left: list[Job],
        found: dict[str, dict[str, Any] | None],
        told: dict[str, Entry],
        alone: bool,
    ) -> None:
        """Say of new jobs whether they are done, and of those that are left that they are."""
        entries = []
        for name, settings in found.items():
            job, status, more = taken[name], WAITING, {}
            self.settled.pop(name, None)
            if settings is not None:
                self.settled[name] = status = DONE
                more = complete_sidecar(self._folder, job, settings)
            entry = entry_of(job, status, **more)
            if alone or not says(told.get(name, {}), entry):
                entries.append(entry)
        for job in left:
            self.settled.pop(job.name, None)
            if not of_another_file(told.get(job.name, {}), self._manifest.file):
                entries.append(entry_of(job, REMOVED))
        if alone:
            self._manifest.begin(entries)
        else:
            self._manifest.add(*entries)

    def _hear(self) -> None:
        """Learn which jobs other processes settled."""
        for name, entry in self._manifest.news().items():
            job = self.pending.get(name)
            if job and entry["status"] in (DONE, FAILED) and entry.get("job") == job.identity:
                self._settle(job, entry["status"])

    def _try(self, job: Job) -> None:
        """Generate a job, unless another process does or did."""
        with self._claims.job(job.name) as mine:
            if not mine:
                return
            self._hear()  # its owner may have settled it just before
            if job.name not in self.pending:
                return
            entry = finished_before(self._folder, job)  # or was killed before it could say so
            if entry is None:
                if self._runner is None:
                    self._runner = self._make_runner(job.request)
                if self._stop.asked:
                    return
                entry = self._generate(self._runner, job)
            self._manifest.add(entry)
            self._settle(job, entry["status"])

    def _generate(self, runner: PipelineRunner, job: Job) -> Entry:
        try:
            entry = generate_job(runner, self._folder, job, self._progress.step)
        except OSError as error:
            self._manifest.add(failed(job, error))
            raise
        self.generated += entry["status"] == DONE
        return entry

    def _settle(self, job: Job, status: str) -> None:
        del self.pending[job.name]
        self.settled[job.name] = status
        self._progress.settle(job.request)
        self._progress.count(len(self.settled), len(self._jobs))


def _refuse_at_work(job: Job, told: Entry | None) -> None:
    if told is not None and told.get("job") != job.identity:
        raise RequestError(
            f"the id {job.name!r} is that of another job, at which another process is at work in "
            "the folder; wait for it, or name another folder."
        )


def _ordered(jobs: list[Job], launch: Launch) -> list[Job]:
    """By what the pipeline is switched to, then by size, the largest first.

    So it is seldom switched, an image that is too large is known early, and processes end at
    about the same time.
    """
    jobs = sorted(jobs, key=_geometry)
    start = len(jobs) * launch.rank // launch.processes
    return jobs[start:] + jobs[:start]


def _geometry(job: Job) -> tuple[Any, ...]:
    r = job.request
    switch = (r.attention, r.radius, r.down_factor, str(r.far), r.weights or "")
    lora = (r.lora or "", r.lora_scale)
    schedule = "" if r.schedule is None else r.schedule.digest
    return (*switch, *lora, schedule, -r.height * r.width, r.height, r.steps, job.line)
