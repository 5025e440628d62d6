"""Jobs: what visitors asked for, and the one thread that generates one after the other."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import RequestError, first_line
from ..generation.request import GenerateRequest
from ..generation.runner import PipelineRunner, Step, Stopped
from ..generation.stage_plan import PlannedStage, StagePlanner
from .preview import Previewer
from .settings import MAX_JOBS_OF_VISITOR, Settings
from .store import Store, new_name
from .tiles import write_tiles

# How often images that are too old are looked for, in seconds.
SWEEP_EVERY = 3600.0

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Job:
    """One or two images for a visitor: waiting, running, and then done, cancelled or failed.

    Attributes:
        id: random, known to its visitor only.
        visitor: the name of the visitor's folder.
        requests: to generate one after the other, of the same model.
        folder: for the images.
        image_name: what the visitor calls the image to enlarge.
        image_size: of that image, height and width in pixels.
        created: seconds since 1970.
        state: "waiting", "running", "done", "cancelled" or "failed".
        phase: what is being done, in words.
        plan: of each request; empty until the pipeline is loaded.
        flops_done: of the steps that are finished.
        preview: a data URL of the image as it is expected, or None.
        error: why it failed, for the visitor.
        images: what is known of those finished.
    """

    id: str
    visitor: str
    requests: tuple[GenerateRequest, ...]
    folder: Path
    image_name: str | None = None
    image_size: tuple[int, int] | None = None
    created: float = field(default_factory=time.time)
    state: str = "waiting"
    phase: str = ""
    plan: tuple[tuple[PlannedStage, ...], ...] = ()
    flops_done: float = 0.0
    started: float | None = None
    preview: str | None = None
    error: str | None = None
    images: list[dict[str, Any]] = field(default_factory=list)
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def flops(self) -> float:
        """Of all its images; 0 until the plan is known."""
        return sum(stage.flops for stages in self.plan for stage in stages)

    def record(self) -> dict[str, Any]:
        """What is kept on the disk."""
        first = self.requests[0]
        return {
            "id": self.id,
            "state": self.state,
            "created": self.created,
            "error": self.error,
            "prompt": first.prompt,
            "model": first.model,
            "height": first.height,
            "width": first.width,
            "radius": first.radius,
            "down_factor": first.down_factor,
            "steps": first.steps,
            "guidance": first.guidance,
            "seed": first.seed,
            "image": self.image_name,
            "attention": [request.attention for request in self.requests],
            "images": list(self.images),  # it goes on
        }


class Jobs:
    """The queue and its thread.

    Every job that `submit` returned ends as done, cancelled or failed, and its record is on the
    disk from the beginning.

    Args:
        settings: of the server.
        store: where images go.
        make_runner: see `PipelineRunner`.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        make_runner: Callable[[str, str, str], PipelineRunner] = PipelineRunner,
    ) -> None:
        self._settings, self._store, self._make_runner = settings, store, make_runner
        self._changed = threading.Condition()
        self._waiting: list[Job] = []
        self._running: Job | None = None
        self._stopping = False
        self._runner: PipelineRunner | None = None
        self._runner_for: tuple[str, str, str] | None = None
        self._planners: dict[str, StagePlanner] = {}
        # Of the jobs so far: for an estimate of those that wait.
        self._seconds_per_flop: float | None = None
        self._thread = threading.Thread(target=self._work, name="runner", daemon=True)

    def start(self, model: str, dtype: str, device: str) -> None:
        """Load a model, and begin to work.

        Raises:
            RequestError: it cannot be loaded.
        """
        self._store.end_interrupted()
        self._load(model, dtype, device)
        self._thread.start()

    def stop(self) -> None:
        """Cancel what runs and waits, and wait for the thread."""
        with self._changed:
            self._stopping = True
            for job in [*self._waiting, *([self._running] if self._running else [])]:
                job.cancelled.set()
            self._changed.notify_all()
        self._thread.join()

    def submit(
        self,
        visitor: str,
        requests: tuple[GenerateRequest, ...],
        image: Path | None = None,
        image_name: str | None = None,
        image_size: tuple[int, int] | None = None,
    ) -> Job:
        """Accept a job, or refuse it.

        Args:
            visitor: the name of the visitor's folder.
            requests: of one model.
            image: what they enlarge, already theirs; the job keeps a link of its own.
            image_name, image_size: of that image.

        Raises:
            RequestError: the queue is full, or has enough of this visitor; or the request cannot
                be generated.
            OSError: the disk is full.
        """
        planner = self._planners.get(requests[0].model)
        plan = _plan(planner, requests, image_size) if planner else ()
        with self._changed:
            if self._stopping:
                raise RequestError("The server is being stopped; try again later.")
            theirs = [job for job in self._active() if job.visitor == visitor]
            if len(theirs) >= MAX_JOBS_OF_VISITOR:
                raise RequestError(
                    f"You have {len(theirs)} images in the queue, which is as many as one "
                    "visitor may have; wait for one or cancel it."
                )
            if len(self._waiting) >= self._settings.queue_size:
                raise RequestError(
                    f"The queue is full ({len(self._waiting)} are waiting); try again later."
                )
            name = new_name()
            folder = self._store.new_folder(visitor, name)
            try:
                if image is not None:
                    own = str(_linked(image, folder / "image"))
                    requests = tuple(replace(request, image=own) for request in requests)
                job = Job(name, visitor, requests, folder, image_name, image_size, plan=plan)
                self._store.write(visitor, job.record())
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            self._waiting.append(job)
            self._changed.notify_all()
        return job

    def cancel(self, visitor: str, name: str) -> bool:
        """Cancel a visitor's job; whether it was still waiting or running."""
        with self._changed:
            job = self._find(visitor, name)
            if job is None:
                return False
            job.cancelled.set()
            if job in self._waiting:
                self._waiting.remove(job)
                self._end(job, "cancelled", None)
            return True

    def active(self, visitor: str) -> list[dict[str, Any]]:
        """A visitor's jobs that wait or run, the first of the queue first, as `status` tells."""
        with self._changed:
            return [self._tell(job) for job in self._active() if job.visitor == visitor]

    def status(self, visitor: str, name: str) -> dict[str, Any] | None:
        """What a visitor may know of a job; None if it is not theirs or there is none.

        Besides the record: place (in the queue, 1 is next), waiting (how many there are), phase,
        fraction (of the work, 0 to 1), seconds_left (None where unknown) and preview; only while
        it waits or runs.
        """
        with self._changed:
            job = self._find(visitor, name)
            if job is not None:
                return self._tell(job)
        return self._store.read(visitor, name)

    def _active(self) -> list[Job]:
        return [*([self._running] if self._running else []), *self._waiting]

    def _find(self, visitor: str, name: str) -> Job | None:
        same = (job for job in self._active() if (job.visitor, job.id) == (visitor, name))
        return next(same, None)

    def _tell(self, job: Job) -> dict[str, Any]:
        ahead = self._waiting[: self._waiting.index(job)] if job in self._waiting else []
        before = [*([self._running] if self._running not in (None, job) else []), *ahead]
        times = [self._seconds_left(one) for one in [*before, job]]
        known = [seconds for seconds in times if seconds is not None]
        return job.record() | {
            "place": len(ahead) + 1 if job.state == "waiting" else 0,
            "waiting": len(self._waiting),
            "phase": job.phase,
            "fraction": job.flops_done / job.flops if job.flops else 0.0,
            "seconds_left": sum(known) if len(known) == len(times) else None,
            "preview": job.preview,
        }

    def _seconds_left(self, job: Job) -> float | None:
        left = job.flops - job.flops_done
        if job.started is not None and job.flops_done:
            return (time.monotonic() - job.started) * left / job.flops_done
        if self._seconds_per_flop is None or not job.flops:
            return None
        return left * self._seconds_per_flop

    def _work(self) -> None:
        swept = -SWEEP_EVERY
        while True:
            if time.monotonic() - swept >= SWEEP_EVERY:
                swept = time.monotonic()
                self._sweep()
            with self._changed:
                if not self._waiting:
                    if self._stopping:
                        return
                    self._changed.wait(timeout=SWEEP_EVERY)
                    continue
                job = self._running = self._waiting.pop(0)
                job.state = "running"
            state, error = self._run(job)
            with self._changed:
                self._end(job, state, error)
                self._running = None

    def _sweep(self) -> None:
        try:
            self._store.remove_older(self._settings.keep_days)
        except OSError:
            logger.exception("old images could not be removed")

    def _run(self, job: Job) -> tuple[str, str | None]:
        """Generate a job, whatever happens; its state then, and why it failed."""
        try:
            self._generate(job)
            return "done", None
        except Stopped:
            return "cancelled", None
        except (RequestError, MemoryError, FloatingPointError) as problem:
            error = first_line(problem).replace("--", "")
            logger.warning("job %s failed: %s", job.id, error)
        except OSError as problem:
            # Not what it says itself: paths of this machine.
            reason = os.strerror(problem.errno) if problem.errno else "disk"
            error = f"The image could not be written ({reason})."
            logger.exception("job %s failed", job.id)
        except Exception:
            error = "Something went wrong on the server, which has written it down."
            logger.exception("job %s failed", job.id)
        return "failed", error

    def _generate(self, job: Job) -> None:
        first = job.requests[0]
        if job.cancelled.is_set():
            raise Stopped
        runner = self._load(first.model, first.dtype, first.device)
        if not job.plan:
            job.plan = _plan(self._planners[first.model], job.requests, job.image_size)
        job.started = time.monotonic()
        for request, stages in zip(job.requests, job.plan, strict=True):
            self._generate_one(job, runner, request, stages)
        taken = (time.monotonic() - job.started) / job.flops
        before = self._seconds_per_flop
        self._seconds_per_flop = taken if before is None else 0.5 * (before + taken)

    def _generate_one(
        self,
        job: Job,
        runner: PipelineRunner,
        request: GenerateRequest,
        stages: tuple[PlannedStage, ...],
    ) -> None:
        previewer = Previewer(runner.pipe)
        which = f"{request.attention} attention, " if len(job.requests) > 1 else ""
        before = job.flops_done
        job.phase = f"{which}reading the prompt"

        def on_step(step: Step) -> None:
            done = sum(stage.flops for stage in stages[: step.stage - 1])
            job.flops_done = before + done + stages[step.stage - 1].flops * step.step / step.steps
            stage = f"stage {step.stage} of {step.stages}, " if step.stages > 1 else ""
            size = f"{step.width} × {step.height} px"
            job.phase = f"{which}{stage}{size}, step {step.step} of {step.steps}"
            job.preview = previewer.after(step) or job.preview
            if (step.stage, step.step) == (step.stages, step.steps):
                job.phase = f"{which}writing the image"

        out = job.folder / f"{request.attention}.png"
        notes = {"image": job.image_name}
        stop = job.cancelled.is_set
        result = runner.generate(request, out, on_step=on_step, should_stop=stop, notes=notes)
        if stop():
            raise Stopped
        job.phase = f"{which}cutting tiles"
        top = write_tiles(out, job.folder / f"{request.attention}_files")
        told = ("height", "width", "impl", "far", "weights", "seconds", "peak_memory_mb")
        job.flops_done = before + sum(stage.flops for stage in stages)
        job.images.append(
            {name: result[name] for name in told}
            | {
                "attention": request.attention,
                "flops": sum(stage.flops for stage in stages),
                "bytes": out.stat().st_size,
                "levels": top + 1,
            }
        )

    def _end(self, job: Job, state: str, error: str | None) -> None:
        """Keep an ended job's record, and none of its images unless it is done."""
        job.state, job.error, job.preview = state, error, None
        try:
            if state != "done":
                self._store.remove_images(job.visitor, job.id)
            self._store.write(job.visitor, job.record())
        except OSError:
            logger.exception("the end of job %s could not be written", job.id)
            if state == "done":
                job.images = []
                self._end(job, "failed", "The image could not be written; the disk is full.")

    def _load(self, model: str, dtype: str, device: str) -> PipelineRunner:
        """The runner of a model; another one is freed first."""
        wanted = (model, dtype, device)
        if self._runner is None or self._runner_for != wanted:
            self._runner = self._runner_for = None
            self._runner = self._make_runner(*wanted)
            self._runner_for = wanted
        if model not in self._planners:
            self._planners[model] = StagePlanner(model)
        return self._runner


def _linked(upload: Path, own: Path) -> Path:
    """A link of a job's own: uploads are forgotten sooner, maybe just now.

    Raises:
        RequestError: it is gone.
    """
    try:
        own.hardlink_to(upload)
    except FileNotFoundError as error:
        raise RequestError("The uploaded image is gone; choose it again.") from error
    return own


def _plan(
    planner: StagePlanner,
    requests: tuple[GenerateRequest, ...],
    image_size: tuple[int, int] | None,
) -> tuple[tuple[PlannedStage, ...], ...]:
    try:
        return tuple(planner.plan(request, image_size) for request in requests)
    except ValueError as error:
        raise RequestError(str(error)) from error
