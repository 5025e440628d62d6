"""What callers can do, as functions of plain values: behind the page's routes and the API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..generation.checks import find_device
from ..generation.image_input import open_image
from ..generation.prompt_notes import PromptReader
from ..generation.stage_plan import PlannedStage, StagePlanner, UnguidedError
from ..kernels.numbers import as_integer
from ..memory import total_bytes
from .caller import Caller
from .entry import MAX_SEED, Entry, EntryError, for_visitor, make_entry, make_requests
from .job import Order, Source
from .jobs import Jobs
from .settings import MAX_IMAGES, Settings
from .store import ENDED, SOURCE, Store

# How often a running job is looked at, in seconds.
LOOK_EVERY = 0.25


class NotThereError(RequestError):
    """There is no such job or upload of this caller."""

    def __init__(
        self, words: str = "There is no such image of yours; it may have been removed."
    ) -> None:
        super().__init__(words)


class Actions:
    """The actions of one server.

    Args:
        settings, store, jobs: of the server.
    """

    def __init__(self, settings: Settings, store: Store, jobs: Jobs) -> None:
        self.settings = settings
        self.store = store
        self.jobs = jobs
        self._planners = {model: StagePlanner(model) for model in settings.models}
        self._readers = {model: PromptReader(model) for model in settings.models}
        for model in settings.models:
            (request,) = make_requests(
                make_entry({"prompt": "any", "model": model}, settings), settings
            )
            self._planners[model].prepare(request)
        self.memory: int | None = total_bytes(find_device(settings.device))

    def reader(self, model: str) -> PromptReader:
        """What tells how one of the server's models reads prompts."""
        return self._readers[model]

    def submit(
        self,
        given: Any,
        images: Any,
        caller: Caller,
        image_name: str = "image",
        *,
        shown: bool = True,
    ) -> list[dict[str, Any]]:
        """Put images of an entry into the queue, each with the next seed; all or none.

        Args:
            given: the entry, see `make_entry`.
            images: how many.
            caller: who asks.
            image_name: what they call the image to enlarge.
            shown: see `Order`.

        Returns:
            Of each its status.

        Raises:
            RequestError: it is refused; why.
        """
        count = _count(images)
        first = self._order(make_entry(given, self.settings), caller, image_name)
        first = replace(first, shown=shown)
        if first.requests[0].seed + count - 1 > MAX_SEED:
            raise EntryError(f"Seed must be at most {MAX_SEED - count + 1:,}.", "seed")
        return self._submit([_later(first, number) for number in range(count)], caller)

    def again(self, job: str, caller: Caller) -> list[dict[str, Any]]:
        """Put the entry of an ended job into the queue anew.

        Raises:
            RequestError: there is no such job of this caller, or it is refused.
        """
        record = self.status(job, caller)
        entry = make_entry(record["entry"], self.settings)
        source = self.store.file(caller.owner, job, SOURCE)
        if entry.image and source is None:
            raise NotThereError("The image that it enlarges is gone.")
        found = None if source is None else _source(source, record["image_name"] or "image")
        return self._submit([self._planned(entry, found)], caller)

    def estimate(self, given: Any, images: Any, caller: Caller) -> dict[str, Any]:
        """What an entry would take, or why it would be refused."""
        told: dict[str, Any] = {
            "allowed": False,
            "reason": None,
            "field": None,
            "seconds": None,
            "queue_seconds": None,
            "memory_bytes": None,
            "memory_total": self.memory,
            "flops": None,
            "stages": [],
            "notes": [],
        }
        try:
            order = self._order(make_entry(given, self.settings), caller, "image", check=False)
            told |= {
                "seconds": self.jobs.worker.seconds(order),
                "queue_seconds": self.jobs.queue_seconds(caller),
                "memory_bytes": self._memory(order),
                "flops": order.flops,
                "stages": [_told(stage) for stage in order.plan[0]],
                "notes": self._readers[order.requests[0].model].notes(order.requests[0].prompt),
            }
            self._check_memory(order)
            self.jobs.check_limits(caller, _count(images))
        except RequestError as error:
            field = getattr(error, "field", None)
            return told | {"reason": str(error), "field": field}
        return told | {"allowed": True}

    def status(self, job: str, caller: Caller) -> dict[str, Any]:
        """See `Jobs.status`.

        Raises:
            NotThereError: there is no such job of this caller.
        """
        found = self.jobs.status(caller.owner, job)
        if found is None:
            raise NotThereError
        return found

    def all(self, caller: Caller) -> list[dict[str, Any]]:
        """A caller's jobs: those at work, then those that ended, the newest first."""
        active = self.jobs.active(caller.owner)
        ids = {job["id"] for job in active}
        ended = [job for job in self.store.history(caller.owner) if job["id"] not in ids]
        return [*active, *ended]

    async def follow(self, job: str, caller: Caller) -> AsyncIterator[dict[str, Any]]:
        """`status` whenever it has changed, until the job has ended."""
        last = None
        while last is None or last["state"] not in ENDED:
            found = self.status(job, caller)
            if found != last:
                yield found
                last = found
            else:
                await asyncio.sleep(LOOK_EVERY)

    def remove(self, job: str, caller: Caller) -> None:
        """Remove an ended job with its images, or cancel one at work.

        Raises:
            NotThereError: there is no such job of this caller.
        """
        if self.jobs.cancel(caller.owner, job):
            return
        if not self.store.remove(caller.owner, job):
            raise NotThereError

    def _submit(self, orders: list[Order], caller: Caller) -> list[dict[str, Any]]:
        jobs = self.jobs.submit(caller, orders)
        return [self.status(job.id, caller) for job in jobs]

    def _order(self, entry: Entry, caller: Caller, image_name: str, *, check: bool = True) -> Order:
        source = None
        if entry.image:
            name = entry.image if isinstance(entry.image, str) else ""
            path = self.store.upload(caller.owner, name)
            if path is None:
                raise EntryError("The image to enlarge is gone; choose it again.", "image")
            source = _source(path, image_name)
        return self._planned(entry, source, check=check)

    def _planned(self, entry: Entry, source: Source | None, *, check: bool = True) -> Order:
        image = None if source is None else str(source.path)
        requests = make_requests(entry, self.settings, image)
        size = None if source is None else source.size
        planner = self._planners[requests[0].model]
        try:
            plan = tuple(planner.plan(request, size) for request in requests)
        except UnguidedError as error:
            raise EntryError(
                "A negative prompt does nothing where an image is enlarged with a little noise, as "
                "here; leave it out, or set Strength.",
                "negative_prompt",
            ) from error
        except ValueError as error:
            raise EntryError(for_visitor(error)) from error
        order = Order(entry, requests, source, plan)
        if check:
            self._check_memory(order)
        return order

    def _memory(self, order: Order) -> int:
        """Of the transformer in bytes, for that of an order's images which takes most."""
        planner = self._planners[order.requests[0].model]
        last = zip(order.requests, order.plan, strict=True)
        return max(most for one, stages in last for most in planner.memory(one, stages[-1:]))

    def _check_memory(self, order: Order) -> None:
        """Refuse what the machine cannot hold.

        Raises:
            EntryError: how much is needed, and how much there is.
        """
        request = order.requests[0]
        if self.memory is None or request.offload != "none":
            return
        needed = self._memory(order)
        if needed > self.memory:
            raise EntryError(
                f"{request.width} × {request.height} px need about {needed / 2**30:.0f} GiB, and "
                f"the machine has {self.memory / 2**30:.0f}; choose a smaller size.",
                "width",
            )


def _count(images: Any) -> int:
    count = as_integer(images)
    if count is None or not 1 <= count <= MAX_IMAGES:
        raise EntryError(f"The number of images must be from 1 to {MAX_IMAGES}.")
    return count


def _source(path: Path, name: str) -> Source:
    with open_image(path, "The image to enlarge") as opened:
        return Source(path, name[:200], (opened.height, opened.width))


def _later(order: Order, number: int) -> Order:
    """The same with another seed."""
    requests = tuple(replace(one, seed=one.seed + number) for one in order.requests)
    return replace(order, entry=replace(order.entry, seed=requests[0].seed), requests=requests)


def _told(stage: PlannedStage) -> Mapping[str, Any]:
    names = ("width", "height", "steps", "attention")
    return {name: getattr(stage, name) for name in names}
