"""One request's images: ordered, followed to their end, and removed when they are answered."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastapi.concurrency import run_in_threadpool

from ...generation.models import find_model
from ..actions import LOOK_EVERY, Actions, NotThereError
from ..caller import Caller
from ..entry import default_side
from ..reception import Reception
from ..store import ENDED
from ..turns import Turns
from .errors import FailedError, ParamError
from .fields import KINDS, ImageRequest

# Seconds: small images on a GPU are soon there.
_FIRST_LOOK = 0.02


class Images:
    """Those of one request.

    Args:
        actions, reception, turns: of the server.
        caller: who asks, with a folder of this request's own.
        given: the request.
    """

    def __init__(
        self,
        actions: Actions,
        reception: Reception,
        turns: Turns,
        caller: Caller,
        given: ImageRequest,
    ) -> None:
        self._actions, self._reception, self._turns = actions, reception, turns
        self.caller = caller
        self.given = given
        self.jobs: list[dict[str, Any]] = []

    async def order(self, upload: dict[str, Any] | None = None, name: str = "image") -> None:
        """Put them into the queue, all or none.

        Args:
            upload: of the image to edit, as `Reception.keep` told; it is forgotten.
            name: what it is called.

        Raises:
            RequestError: they are refused.
        """
        given, settings = self.given, self._actions.settings
        entry = given.entry()
        if entry["model"] is None:
            entry["model"] = settings.models[0]
        elif entry["model"] not in settings.models:
            raise ParamError(
                f"There is no model {entry['model'][:100]!r}; there are "
                f"{', '.join(settings.models)}.",
                "model",
                404,
                "model_not_found",
            )
        if entry["seed"] is None:
            entry["seed"] = secrets.randbelow(2**32)
        size = given.pixels()
        if upload is not None:
            entry["image"] = upload["name"]
            size = size or self._size_of(entry["model"], upload)
        if size is not None:
            entry["width"], entry["height"] = size
        async with self._turns.turn(self.caller):
            self.jobs = await run_in_threadpool(
                self._actions.submit, entry, given.n or 1, self.caller, name, shown=False
            )

    def _size_of(self, name: str, upload: dict[str, Any]) -> tuple[int, int]:
        """Width and height that fit an image to edit: its own, or larger up to the model's own."""
        settings, model = self._actions.settings, find_model(name)
        width, height, step = upload["width"], upload["height"], model.side_pixels
        least = default_side(model, settings)
        factor = max(1.0, least / (width * height) ** 0.5)
        sides = [side * factor / step for side in (width, height)]
        wide, high = (max(1, round(side)) * step for side in sides)
        if wide * high > settings.max_pixels:
            wide, high = (max(1, int(side)) * step for side in sides)
        return wide, high

    @property
    def size(self) -> str:
        """As OpenAI writes it."""
        entry = self.jobs[0]["entry"]
        return f"{entry['width']}x{entry['height']}"

    async def follow(self, number: int) -> AsyncIterator[dict[str, Any]]:
        """What is known of one, now and again, until it is finished.

        Raises:
            FailedError: it could not be made.
        """
        job, pause = self.jobs[number]["id"], _FIRST_LOOK
        while True:
            try:
                found = self._actions.status(job, self.caller)
            except NotThereError as error:  # somebody emptied the folder
                raise FailedError("The image is gone.") from error
            if found["state"] == "done":
                return
            if found["state"] in ENDED:
                if not self._actions.jobs.alive:
                    raise FailedError("The server is being stopped.", 503)
                raise FailedError(found["error"] or "The image was cancelled.")
            yield found
            await asyncio.sleep(pause)
            pause = min(1.5 * pause, LOOK_EVERY)

    async def file(self, number: int) -> Path:
        """The file of a finished one, in the format that was asked for.

        Raises:
            RequestError: it is too large for that format.
            FailedError: it is gone.
        """
        which = self.given.attention or "clear"
        job, kind = self.jobs[number]["id"], KINDS[self.given.output_format or "png"]
        path = self._actions.store.file(self.caller.owner, job, f"{which}.png")
        if path is None:
            raise FailedError("The image is gone.")
        if kind == "png":
            return path
        return await self._reception.convert(path, kind)

    def owner_and_job(self, number: int) -> tuple[str, str]:
        """Where one is in the store."""
        return self.caller.owner, self.jobs[number]["id"]

    def end(self) -> None:
        """Cancel those that are not finished, and remove those that are."""
        for job in self.jobs:
            with suppress(NotThereError):
                self._actions.remove(job["id"], self.caller)
