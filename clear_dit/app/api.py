"""The functions for `gradio_client`, which keeps the visitor's cookie by itself.

    from gradio_client import Client

    client = Client("http://127.0.0.1:7860")
    result = client.predict("a red house by the sea", api_name="/generate")
    url = client.src + result["images"][0]["file"]

Another client with the same cookie `clear-dit-visitor` is the same visitor.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from ..generation.models import model_defaults
from .actions import Actions, who_asks
from .request import Entry


def add_api(actions: Actions) -> None:
    """Name the functions inside of a `gr.Blocks`."""
    models = actions.settings.models

    def submit(
        request: gr.Request,
        prompt: str,
        width: int = 0,
        height: int = 0,
        attention: str = "clear",
        radius: int = 0,
        down_factor: int = 1,
        far: bool | None = None,
        steps: int = 0,
        guidance: float = -1.0,
        seed: int = 0,
        model: str = "",
        image: str = "",
    ) -> dict:
        """Put an image into the queue and return at once: id, state, place, seconds_left.

        width and height are in pixels, multiples of the side of a token (16 for most models);
        attention is clear, full or both (the image twice, to compare); radius and down_factor are
        in tokens; far is whether every token sees the whole image by far keys, null as the weights
        were made for; image is the name that POST /uploads answered for an image to enlarge. 0, -1
        and "" mean the model's defaults.
        """
        name = model or models[0]
        # Of another model's name nothing is looked for: it is refused.
        defaults = model_defaults(name if name in models else models[0])
        entry = Entry(
            prompt,
            width or defaults.size,
            height or defaults.size,
            attention,
            radius or defaults.radius,
            down_factor,
            far,
            steps or defaults.steps,
            defaults.guidance if guidance == -1 else guidance,
            seed,
            name,
        )
        who = who_asks(request)
        return _public(actions.status(actions.submit(entry, image, "uploaded", who), who))

    async def generate(
        request: gr.Request,
        prompt: str,
        width: int = 0,
        height: int = 0,
        attention: str = "clear",
        radius: int = 0,
        down_factor: int = 1,
        far: bool | None = None,
        steps: int = 0,
        guidance: float = -1.0,
        seed: int = 0,
        model: str = "",
        image: str = "",
    ) -> AsyncIterator[dict]:
        """As submit; then tells the status whenever it changes, and last how it ended.

        A client that goes away loses nothing: the image is in its history.
        """
        window = (width, height, attention, radius, down_factor, far)
        found = submit(request, prompt, *window, steps, guidance, seed, model, image)
        job = found["id"]
        async for found in actions.follow(job, who_asks(request)):
            yield _public(found)

    def status(request: gr.Request, job: str) -> dict:
        """An image's state: waiting, running, done, cancelled or failed; and what is known.

        place, seconds_left and fraction while it waits or runs; images with seconds, flops and
        file (to GET with the same cookie) when it is done; error when it failed.
        """
        return _public(actions.status(job, who_asks(request)))

    def cancel(request: gr.Request, job: str) -> bool:
        """Cancel a waiting or running image; whether it was one."""
        return actions.jobs.cancel(who_asks(request), job)

    def history(request: gr.Request) -> list:
        """This visitor's finished images, the newest first."""
        return [_public(found) for found in actions.store.history(who_asks(request))]

    for function in (submit, generate, status, cancel, history):
        gr.api(function, api_name=function.__name__, concurrency_limit=None)


def _public(found: dict[str, Any]) -> dict[str, Any]:
    images = [
        one | {"file": f"images/{found['id']}/{one['attention']}.png"} for one in found["images"]
    ]
    return found | {"images": images}
