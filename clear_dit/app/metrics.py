"""What a server tells Prometheus: its queue, its images, where their time goes, and its memory."""

from __future__ import annotations

from typing import Any

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from .job import Job
from .jobs import Jobs

CONTENT_TYPE = CONTENT_TYPE_LATEST
# From a small image on a GPU to 8K on a CPU, in seconds.
_BUCKETS = (0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600, 1800, 3600)
# Paths are told by name, all others together: labels are kept for ever.
_ROUTES = ("/v1/images/generations", "/v1/images/edits", "/v1/models", "/health", "/metrics")


class Metrics:
    """Those of one server, in a registry of their own.

    Args:
        jobs: of the server; not started yet.
    """

    def __init__(self, jobs: Jobs) -> None:
        registry = CollectorRegistry()
        self.registry: CollectorRegistry = registry
        ProcessCollector(registry=registry)
        waiting = Gauge("clear_dit_jobs_waiting", "Jobs in the queue.", registry=registry)
        waiting.set_function(lambda: jobs.waiting)
        running = Gauge("clear_dit_jobs_running", "Jobs being generated.", registry=registry)
        running.set_function(lambda: jobs.running)
        self._jobs = Counter(
            "clear_dit_jobs",
            "Jobs that ended: done, failed or cancelled.",
            ("model", "state"),
            registry=registry,
        )
        self._seconds = Histogram(
            "clear_dit_image_seconds",
            "Seconds of an image in each stage: text, denoise, decode; and total.",
            ("model", "stage"),
            buckets=_BUCKETS,
            registry=registry,
        )
        self._pixels = Counter(
            "clear_dit_pixels", "Pixels of finished images.", ("model",), registry=registry
        )
        self._memory = Gauge(
            "clear_dit_peak_memory_bytes",
            "The most that the last image took, of the device or else of the process.",
            ("model",),
            registry=registry,
        )
        self._requests = Counter(
            "clear_dit_requests", "Answered requests.", ("route", "status"), registry=registry
        )
        jobs.on_end(self._ended)

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self.registry)

    def _ended(self, job: Job) -> None:
        model = job.order.requests[0].model
        self._jobs.labels(model, job.state).inc()
        for image in job.images:
            for stage, seconds in image["seconds"].items():
                self._seconds.labels(model, stage).observe(seconds)
            self._pixels.labels(model).inc(image["height"] * image["width"])
            self._memory.labels(model).set(image["peak_memory_mb"] * 2**20)

    def answered(self, path: str, status: int) -> None:
        """Count a request."""
        self._requests.labels(path if path in _ROUTES else "other", str(status)).inc()


class Counted:
    """ASGI middleware that counts what is answered, refusals included.

    Args:
        app: whose answers.
        metrics: where.
    """

    def __init__(self, app: Any, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                self._metrics.answered(scope["path"], message["status"])
            await send(message)

        await self._app(scope, receive, counted)
