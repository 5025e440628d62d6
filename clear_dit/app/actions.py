"""What visitors can do, as functions of plain values: behind the page's buttons and the API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from ..errors import RequestError
from ..generation.image_input import open_image
from ..generation.models import find_model
from .guard import visitor
from .jobs import Jobs
from .request import Entry, make_requests
from .settings import Settings
from .store import ENDED, Store

# How often a running job is looked at, in seconds.
LOOK_EVERY = 0.25


class Actions:
    """The actions of one server.

    Args:
        settings, store, jobs: of the server.
    """

    def __init__(self, settings: Settings, store: Store, jobs: Jobs) -> None:
        self.settings, self.store, self.jobs = settings, store, jobs

    def submit(self, entry: Entry, image: str, image_name: str, who: str) -> str:
        """Put an image into the queue; the job's name.

        Args:
            entry: what was entered.
            image: the name of an upload to enlarge, or "".
            image_name: what the visitor calls it.
            who: the name of the visitor's folder.

        Raises:
            gr.Error: it is refused; why.
        """
        try:
            if not image:
                return self.jobs.submit(who, make_requests(entry, self.settings)).id
            path = self.store.upload(who, image)
            if path is None:
                raise RequestError("The uploaded image is gone; choose it again.")
            with open_image(path) as opened:
                size = (opened.height, opened.width)
            requests = make_requests(entry, self.settings, image=str(path))
            return self.jobs.submit(who, requests, path, image_name, size).id
        except RequestError as error:
            raise refusal(error) from error

    def enlarged(self, image: str, model: str, who: str) -> tuple[int, int] | None:
        """Width and height in pixels that suit a model's enlargement of an upload.

        None if it is gone, or the model is none of the server's.
        """
        from ..pipelines.cascade.given_image import enlarged_size

        path = self.store.upload(who, image)
        if path is None or model not in self.settings.models:
            return None
        step = find_model(model).side_pixels
        with open_image(path) as opened:
            height, width = enlarged_size(None, None, (opened.height, opened.width), step)
        return width, height

    def status(self, job: str, who: str) -> dict[str, Any]:
        """See `Jobs.status`.

        Raises:
            gr.Error: there is no such job of this visitor.
        """
        found = self.jobs.status(who, job)
        if found is None:
            raise refusal("There is no such image of yours; it may have been removed.")
        return found

    async def follow(self, job: str, who: str) -> AsyncIterator[dict[str, Any]]:
        """`status` whenever it has changed, until the job has ended."""
        last = None
        while last is None or last["state"] not in ENDED:
            found = self.status(job, who)
            if found != last:
                yield found
                last = found
            else:
                await asyncio.sleep(LOOK_EVERY)


def refusal(reason: object) -> gr.Error:
    """What a visitor sees as a message that goes by itself."""
    return gr.Error(str(reason), duration=12, print_exception=False)


def who_asks(request: gr.Request) -> str:
    """The name of the visitor's folder."""
    return visitor(request.cookies)
