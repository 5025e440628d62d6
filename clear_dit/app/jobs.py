"""The queue: what callers asked for, who may ask for more, and the thread that generates."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..generation.runner import PipelineRunner
from .caller import Caller
from .fair import FairQueue
from .job import Job, Order
from .settings import MAX_JOBS, Settings
from .store import SOURCE, Store
from .worker import Worker

# Cancelled jobs of which it is kept that they were.
MAX_CANCELLED = 100
# How often images that are too old are looked for, in seconds.
SWEEP_EVERY = 3600.0
# What a refused caller is told to wait at most, in seconds.
_LONGEST_WAIT = 60.0

logger: logging.Logger = logging.getLogger(__name__)


class LimitError(RequestError):
    """Not now: the queue is full, or has enough of this caller.

    Args:
        words: for the caller.
        seconds: after which to try again.
    """

    def __init__(self, words: str, seconds: float = 5.0) -> None:
        super().__init__(words)
        self.seconds = seconds


class Jobs:
    """The queue and its thread.

    Every job that `submit` returned ends as done, cancelled or failed, and its record is on the
    disk from the beginning.

    Args:
        settings: of the server.
        store: where images go.
        make_runner: see `Worker`.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        make_runner: Callable[[str, str, str], PipelineRunner] = PipelineRunner,
    ) -> None:
        self._settings, self._store = settings, store
        self.worker: Worker = Worker(make_runner, settings.out / "speeds.json")
        self._changed = threading.Condition()
        self._waiting: FairQueue[Job] = FairQueue()
        self._running: Job | None = None
        self._stopping = False
        # Cancelled ones are not shown: the last can still be asked for.
        self._cancelled: deque[Job] = deque()
        self._ended: list[Callable[[Job], None]] = []
        self._thread = threading.Thread(target=self._work, name="runner", daemon=True)

    def start(self, model: str, dtype: str, device: str) -> None:
        """Load a model, and begin to work.

        Raises:
            RequestError: it cannot be loaded.
        """
        self._store.end_interrupted()
        self.worker.load(model, dtype, device)
        self._thread.start()

    def stop(self) -> None:
        """Stop what runs and waits, which the next server will say, and wait for the thread."""
        with self._changed:
            self._stopping = True
            for job in self._active():
                job.cancelled.set()
            self._changed.notify_all()
        self._thread.join()

    def on_end(self, told: Callable[[Job], None]) -> None:
        """Call this with every job that ends here; from the thread that ends it, so be quick."""
        self._ended.append(told)

    def submit(self, caller: Caller, orders: Sequence[Order]) -> list[Job]:
        """Accept jobs, all of them or none.

        Raises:
            LimitError: the queue has no place for so many, or they are too many of this caller.
            RequestError: the source is gone, or the disk nearly full.
            OSError: the disk is full.
        """
        with self._changed:
            self._check(caller, len(orders))
            jobs: list[Job] = []
            try:
                jobs.extend(self._new_job(caller, order) for order in orders)
            except BaseException:
                for job in jobs:
                    self._store.remove(job.owner, job.id)
                raise
            for job in jobs:
                self._waiting.add(job)
            self._changed.notify_all()
        return jobs

    def cancel(self, owner: str, name: str) -> bool:
        """Cancel an owner's job; whether it was still waiting or running."""
        with self._changed:
            job = self._find(owner, name)
            if job is None:
                return False
            job.cancelled.set()
            if job in self._waiting:
                self._waiting.remove(job)
                self._end(job, "cancelled", None)
            return True

    def active(self, owner: str) -> list[dict[str, Any]]:
        """An owner's jobs that wait or run, the first of the queue first, as `status` tells."""
        with self._changed:
            return [self._tell(job) for job in self._active() if job.owner == owner]

    def status(self, owner: str, name: str) -> dict[str, Any] | None:
        """What an owner may know of a job; None if it is not theirs or there is none.

        Besides the record: place (in the queue, 1 is next), waiting (how many there are), phase,
        fraction (of the work, 0 to 1), seconds_left (None where unknown), preview and ran (for how
        many seconds); only while it waits or runs.
        """
        with self._changed:
            job = self._find(owner, name)
            if job is not None:
                return self._tell(job)
        return self._store.read(owner, name)

    @property
    def waiting(self) -> int:
        """How many jobs wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many jobs are being generated: 0 or 1."""
        return int(self._running is not None)

    @property
    def alive(self) -> bool:
        """Whether what waits will be generated."""
        return self._thread.is_alive() and not self._stopping

    def queue_seconds(self, caller: Caller) -> float | None:
        """How long a job that came now would wait; None where unknown."""
        with self._changed:
            mine = [job for job in self._waiting if job.party == caller.party]
            ahead = list(self._waiting)
            if not mine:
                # Its turn comes after one of each party.
                first = {job.party: job for job in reversed(ahead)}
                ahead = list(first.values())
            running = [self._running] if self._running else []
            times = [self.worker.seconds_left(job) for job in [*running, *ahead]]
        known = [seconds for seconds in times if seconds is not None]
        return sum(known) if len(known) == len(times) else None

    def check_limits(self, caller: Caller, more: int) -> None:
        """Refuse more jobs than a caller may have now.

        Raises:
            LimitError: which limit, and what to do.
        """
        with self._changed:
            self._check(caller, more)

    def _check(self, caller: Caller, more: int) -> None:
        if self._stopping:
            raise LimitError("The server is being stopped; try again later.", 30)
        left = self.worker.seconds_left(self._running) if self._running else None
        seconds = 5.0 if left is None else min(max(1.0, left), _LONGEST_WAIT)
        active = self._active()
        mine = sum(job.owner == caller.owner for job in active)
        if mine + more > MAX_JOBS:
            raise LimitError(
                f"You have {mine} images in the queue and may have {MAX_JOBS}; wait for one or "
                "cancel it.",
                seconds,
            )
        most = self._settings.most_of_party
        theirs = sum(job.party == caller.party for job in active)
        if theirs + more > most:
            raise LimitError(
                f"There are {theirs} images of your {caller.party.split()[0]} in the queue, which "
                f"may have {most}; try again later.",
                seconds,
            )
        # The one that would run at once needs no place.
        free = self._settings.queue_size - len(self._waiting) + (self._running is None)
        if more > free:
            raise LimitError(
                f"The queue is full ({len(self._waiting)} are waiting); try again later.",
                seconds,
            )

    def _new_job(self, caller: Caller, order: Order) -> Job:
        job = Job(caller, order, Path())
        job.folder = self._store.new_folder(caller.owner, job.id)
        try:
            if order.source is not None:
                own = str(_linked(order.source.path, job.folder / SOURCE))
                requests = tuple(replace(request, image=own) for request in order.requests)
                job.order = replace(order, requests=requests)
            self._store.write(caller.owner, job.record())
        except BaseException:
            self._store.remove(job.owner, job.id)
            raise
        return job

    def _active(self) -> list[Job]:
        return [*([self._running] if self._running else []), *self._waiting]

    def _find(self, owner: str, name: str) -> Job | None:
        same = (job for job in self._active() if (job.owner, job.id) == (owner, name))
        return next(same, None)

    def _tell(self, job: Job) -> dict[str, Any]:
        order = list(self._waiting)
        ahead = order[: order.index(job)] if job in order else []
        before = [*([self._running] if self._running not in (None, job) else []), *ahead]
        times = [self.worker.seconds_left(one) for one in [*before, job]]
        known = [seconds for seconds in times if seconds is not None]
        flops = job.order.flops
        return job.record() | {
            "place": len(ahead) + 1 if job.state == "waiting" else 0,
            "waiting": len(order),
            "phase": job.phase,
            "fraction": job.flops_done / flops if flops else 0.0,
            "seconds_left": sum(known) if len(known) == len(times) else None,
            "preview": job.preview,
            "ran": 0 if job.started is None else round(time.monotonic() - job.started),
        }

    def _work(self) -> None:
        swept = -SWEEP_EVERY
        while True:
            if time.monotonic() - swept >= SWEEP_EVERY:
                swept = time.monotonic()
                self._sweep()
            with self._changed:
                if self._stopping:
                    return
                if not self._waiting:
                    self._changed.wait(timeout=SWEEP_EVERY)
                    continue
                job = self._running = self._waiting.pop()
                job.state = "running"
            state, error = self.worker.run(job)
            with self._changed:
                # While tiles are cut nobody asks; but what a visitor was told counts.
                if job.cancelled.is_set() and not self._stopping:
                    state, error = "cancelled", None
                # What was stopped with the server stays as it is, for the next one to say.
                if not (self._stopping and state == "cancelled"):
                    self._end(job, state, error)
                self._running = None

    def _sweep(self) -> None:
        try:
            self._store.remove_older(self._settings.keep_days)
        except OSError:
            logger.exception("old images could not be removed")

    def _end(self, job: Job, state: str, error: str | None) -> None:
        """Keep an ended job's record, and none of its images unless it is done."""
        if state != "done":
            job.images = []
        job.state, job.error, job.preview = state, error, None
        try:
            self._keep(job)
        except OSError:
            logger.exception("the end of job %s could not be written", job.id)
            if state == "done":
                self._end(job, "failed", "The image could not be written; the disk is full.")
                return
        for told in self._ended:
            told(job)

    def _keep(self, job: Job) -> None:
        if job.state == "cancelled" and not job.order.shown:
            self._store.remove(job.owner, job.id)
            return
        if job.state != "done":
            self._store.remove_images(job.owner, job.id)
        self._store.write(job.owner, job.record())
        if job.state == "cancelled":
            self._cancelled.append(job)
        if len(self._cancelled) > MAX_CANCELLED:
            old = self._cancelled.popleft()
            self._store.remove(old.owner, old.id)


def _linked(upload: Path, own: Path) -> Path:
    """A link of a job's own: uploads are forgotten sooner, maybe just now.

    Raises:
        RequestError: it is gone.
    """
    try:
        own.hardlink_to(upload)
    except FileNotFoundError as error:
        raise RequestError("The image to enlarge is gone; choose it again.") from error
    return own
