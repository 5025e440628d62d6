"""What generates jobs: the loaded pipeline, and what is known of its speed."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ..errors import RequestError
from ..files import whole_file
from ..generation.request import GenerateRequest
from ..generation.runner import PipelineRunner, Step, Stopped
from ..generation.stage_plan import PlannedStage
from .entry import for_visitor
from .job import Job, Order
from .preview import Previewer
from .tiles import write_tiles

logger: logging.Logger = logging.getLogger(__name__)

# Of a result, what a record keeps.
_KEPT = ("height", "width", "impl", "far", "weights", "seconds", "peak_memory_mb")


class Speed(NamedTuple):
    """Seconds for a FLOP of denoising, and for all else of a pixel of any stage."""

    flop: float
    pixel: float


class Worker:
    """Generates one job after the other; for one thread.

    Args:
        make_runner: of a model, a dtype and a device, see `PipelineRunner`.
        speeds: the file in which speeds outlast a restart.
    """

    def __init__(
        self, make_runner: Callable[[str, str, str], PipelineRunner], speeds: Path
    ) -> None:
        self._make_runner, self._path = make_runner, speeds
        self._runner: PipelineRunner | None = None
        self._runner_for: tuple[str, str, str] | None = None
        self._speeds = _read(speeds)

    def load(self, model: str, dtype: str, device: str) -> PipelineRunner:
        """The runner of a model; another one is freed first.

        Raises:
            RequestError: it cannot be loaded.
        """
        wanted = (model, dtype, device)
        if self._runner is None or self._runner_for != wanted:
            self._runner = self._runner_for = None
            self._runner = self._make_runner(*wanted)
            self._runner_for = wanted
        return self._runner

    def seconds(self, order: Order) -> float | None:
        """How long a job takes, by those so far; None before the first of its model."""
        speed = self._speeds.get(_name(order.requests[0]))
        return None if speed is None else speed.flop * order.flops + speed.pixel * order.pixels

    def seconds_left(self, job: Job) -> float | None:
        """How long a job still takes; None where nothing is known."""
        speed = self._speeds.get(_name(job.order.requests[0]))
        left = job.order.flops - job.flops_done
        pixels = job.order.pixels * (1 - job.written)
        if job.started is None or not job.flops_done:
            return self.seconds(job.order)
        # As fast as it has been so far.
        done = time.monotonic() - job.started
        rest = speed.pixel * pixels if speed else 0.0
        if left > 0:
            return done * left / job.flops_done + rest
        since = time.monotonic() if job.denoised is None else job.denoised
        return max(0.0, rest - (time.monotonic() - since)) if speed else None

    def run(self, job: Job) -> tuple[str, str | None]:
        """Generate a job, whatever happens; its state then, and why it failed."""
        try:
            self._generate(job)
            return "done", None
        except Stopped:
            return "cancelled", None
        except (RequestError, MemoryError, FloatingPointError) as problem:
            error = for_visitor(problem)
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
        first = job.order.requests[0]
        if job.cancelled.is_set():
            raise Stopped
        job.phase = "loading the model"
        runner = self.load(first.model, first.dtype, first.device)
        job.started = time.monotonic()
        for request, stages in zip(job.order.requests, job.order.plan, strict=True):
            self._generate_one(job, runner, request, stages)
        self._learn(job)

    def _generate_one(
        self,
        job: Job,
        runner: PipelineRunner,
        request: GenerateRequest,
        stages: tuple[PlannedStage, ...],
    ) -> None:
        previewer = Previewer(runner.pipe)
        which = f"{request.attention} attention, " if len(job.order.requests) > 1 else ""
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
                job.denoised = time.monotonic()

        out = job.folder / f"{request.attention}.png"
        stop = job.cancelled.is_set
        # In the place of this machine's path.
        notes = {"image": None if job.order.source is None else job.order.source.name}
        result = runner.generate(request, out, on_step=on_step, should_stop=stop, notes=notes)
        if stop():
            raise Stopped
        levels = 0
        if job.order.shown:
            job.phase = f"{which}cutting tiles"
            levels = write_tiles(out, job.folder / f"{request.attention}_files") + 1
        job.flops_done = before + sum(stage.flops for stage in stages)
        job.written += 1 / len(job.order.requests)
        job.images.append(
            {name: result[name] for name in _KEPT}
            | {
                "attention": request.attention,
                "flops": sum(stage.flops for stage in stages),
                "bytes": out.stat().st_size,
                "levels": levels,
            }
        )

    def _learn(self, job: Job) -> None:
        """Half of what is known of speeds is the last job's."""
        if job.started is None or not job.order.flops:
            return
        name = _name(job.order.requests[0])
        denoising = sum(image["seconds"]["denoise"] for image in job.images)
        rest = time.monotonic() - job.started - denoising
        found = Speed(denoising / job.order.flops, max(0.0, rest) / job.order.pixels)
        known = self._speeds.get(name, found)
        mean = Speed(*(0.5 * (one + two) for one, two in zip(known, found, strict=True)))
        self._speeds = self._speeds | {name: mean}
        try:
            with whole_file(self._path) as file:
                file.write(json.dumps(self._speeds).encode())
        except OSError:
            logger.exception("speeds could not be written")


def _name(request: GenerateRequest) -> str:
    return " ".join(map(str, (request.model, request.dtype, request.quantize, request.device)))


def _read(path: Path) -> dict[str, Speed]:
    try:
        found = json.loads(path.read_bytes())
        return {str(name): Speed(*map(float, speed)) for name, speed in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
