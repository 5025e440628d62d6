"""A job: one or two images of one entry, from the queue to its end."""

from __future__ import annotations

import shlex
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..generation.request import GenerateRequest
from ..generation.stage_plan import PlannedStage
from .caller import Caller
from .entry import Entry
from .store import new_name


@dataclass(frozen=True)
class Source:
    """An image to enlarge.

    Attributes:
        path: of the upload.
        name: what the visitor calls it.
        size: height and width in pixels.
    """

    path: Path
    name: str
    size: tuple[int, int]


@dataclass(frozen=True)
class Order:
    """What a job is to do: checked, and within the server's bounds.

    Attributes:
        entry: as it was entered.
        requests: to generate one after the other, of the same model.
        source: the image to enlarge.
        plan: the stages of each request.
        shown: whether the page shows it: in a history, and cut into tiles for the viewer.
    """

    entry: Entry
    requests: tuple[GenerateRequest, ...]
    source: Source | None
    plan: tuple[tuple[PlannedStage, ...], ...]
    shown: bool = True

    @property
    def flops(self) -> float:
        """Of all its images."""
        return sum(stage.flops for stages in self.plan for stage in stages)

    @property
    def pixels(self) -> int:
        """Of all stages of all its images."""
        return sum(stage.height * stage.width for stages in self.plan for stage in stages)


@dataclass(eq=False)
class Job:
    """An order of a caller: waiting, running, and then done, cancelled or failed.

    A server that is stopped meanwhile leaves it to the next, which says "stopped".

    Attributes:
        caller: who asked.
        order: what to do; its requests name the job's own link of the source.
        folder: for the images.
        id: random, known to its caller only.
        created: seconds since 1970.
        state: "waiting", "running", "done", "cancelled" or "failed".
        phase: what is being done, in words.
        flops_done: of the steps that are finished.
        written: the share of its images that are written.
        started: when generation began, by the monotonic clock.
        denoised: when the last image's steps were over.
        preview: a data URL of the image as it is expected, or None.
        error: why it failed, for the visitor.
        images: what is known of those finished.
        cancelled: asks the work to end.
    """

    caller: Caller
    order: Order
    folder: Path
    id: str = field(default_factory=new_name)
    created: float = field(default_factory=time.time)
    state: str = "waiting"
    phase: str = ""
    flops_done: float = 0.0
    written: float = 0.0
    started: float | None = None
    denoised: float | None = None
    preview: str | None = None
    error: str | None = None
    images: list[dict[str, Any]] = field(default_factory=list)
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def owner(self) -> str:
        """See `Caller`."""
        return self.caller.owner

    @property
    def party(self) -> str:
        """See `Caller`."""
        return self.caller.party

    def record(self) -> dict[str, Any]:
        """What is kept on the disk, and told."""
        source = self.order.source
        return {
            "id": self.id,
            "state": self.state,
            "created": self.created,
            "entry": self.order.entry.as_json(),
            "image_name": None if source is None else source.name,
            "error": self.error,
            "favourite": False,
            "command": command(self.order),
            "images": list(self.images),  # it goes on
        }


def command(order: Order) -> str:
    """The command line that makes the first of an order's images."""
    request, source = order.requests[0], order.source
    words = ["clear-dit", "generate", request.prompt, "--model", request.model]
    for option, value in (
        ("--width", request.width),
        ("--height", request.height),
        ("--radius", request.radius),
        ("--steps", request.steps),
        ("--guidance", f"{request.guidance:g}"),
        ("--seed", request.seed),
    ):
        words += [option, str(value)]
    if request.attention == "full":
        words += ["--attention", "full"]
    if request.down_factor > 1:
        words += ["--down-factor", str(request.down_factor)]
    if request.far is not None:
        words.append("--far" if request.far else "--no-far")
    if request.strength is not None:
        words += ["--strength", ",".join(f"{one:g}" for one in request.strength)]
    if source is not None:
        words += ["--image", source.name]
    entry = order.entry
    if request.negative_prompt:
        words += ["--negative-prompt", request.negative_prompt]
    if entry.lora:
        words += ["--lora", f"{entry.lora}.safetensors", "--lora-scale", f"{entry.lora_scale:g}"]
    return shlex.join(words)
