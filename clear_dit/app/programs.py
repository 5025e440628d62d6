"""The functions for `gradio_client`, which keeps the visitor's cookie by itself.

    from gradio_client import Client

    client = Client("http://127.0.0.1:7860")
    result = client.predict("a red house by the sea", api_name="/generate")
    url = client.src + result["images"][0]["file"]

Of Gradio only the engine that runs them is here: none of its pages, and no file that it would
serve or take.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import AsyncIterator, Mapping
from typing import Any

# Before it is imported: it reports to its makers otherwise.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool

from ..errors import RequestError
from .actions import Actions
from .caller import who_asks
from .routes import BodyError, not_there, parse_object, read_body, refusal, told
from .turns import Turns

logger: logging.Logger = logging.getLogger(__name__)

# What gradio_client, and curl by Gradio's guide, ask for; the rest of Gradio's routes are closed.
_NAME = r"[A-Za-z0-9_-]{1,64}"
OPEN = {
    "GET": re.compile(
        rf"/config|/gradio_api/(info|queue/data|heartbeat/{_NAME}|call/{_NAME}/{_NAME})"
    ),
    "POST": re.compile(rf"/gradio_api/(queue/join|cancel|reset|call/{_NAME})"),
}


def make_programs(actions: Actions, turns: Turns) -> Programs:
    """The functions, as an ASGI application with Gradio's protocol."""
    with gr.Blocks(mode="server", analytics_enabled=False) as blocks:
        _add(actions, turns)
    blocks.queue(max_size=200, default_concurrency_limit=None)
    engine = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    gr.mount_gradio_app(
        engine,
        blocks,
        path="",
        allowed_paths=[],
        show_error=True,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        max_file_size=0,
    )
    inputs = {number: len(one.inputs) for number, one in blocks.fns.items()}
    names = {str(one.api_name): number for number, one in blocks.fns.items()}
    return Programs(engine, inputs, names)


class Programs:
    """Gradio's engine behind a list of what is open; a call that it cannot read is a 400.

    Args:
        engine: an application with Gradio's at its root.
        inputs: how many values each of its functions takes, by its number.
        names: the functions' numbers by name.
    """

    def __init__(
        self, engine: FastAPI, inputs: Mapping[int, int], names: Mapping[str, int]
    ) -> None:
        self.engine = engine
        self._inputs = inputs
        self._names = names

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        allowed = OPEN.get(scope["method"])
        if allowed is None or not allowed.fullmatch(path):
            await not_there()(scope, receive, send)
            return
        if scope["method"] == "POST":
            try:
                body = await read_body(receive)
                given = parse_object(body)
            except BodyError as error:
                await refusal(error)(scope, receive, send)
                return
            if not self._fits(path, given):
                await told(_BAD_CALL, 400)(scope, receive, send)
                return
            receive = _again(body, receive)
        started = failed = False

        async def answered(message: Any) -> None:
            nonlocal started, failed
            if message["type"] == "http.response.start" and message["status"] >= 500:
                failed = True
            elif not failed:
                started = True
                await send(message)

        try:
            await self.engine(scope, receive, answered)
        except Exception as error:
            # Gradio's own checks of what a call holds are some of these.
            failed = True
            logger.warning("a call that Gradio could not answer: %s", type(error).__name__)
        if failed and started:
            await send({"type": "http.response.body", "body": b""})
        elif failed:
            await told(_BAD_CALL, 400)(scope, receive, send)

    def _fits(self, path: str, given: Mapping[str, Any]) -> bool:
        """Whether a function gets as many values as it takes.

        Of others Gradio writes to stderr what came and where, and tells the caller.
        """
        _, call, name = path.partition("/call/")
        number = self._names.get(name) if call else given.get("fn_index")
        if not call and not path.endswith("/queue/join"):
            return True  # no call
        data = given.get("data")
        wanted = self._inputs.get(number) if type(number) is int else None
        return isinstance(data, list) and len(data) == wanted


_BAD_CALL = {"error": "The call cannot be read: see gradio_client's view_api.", "field": None}


def _again(body: bytes, receive: Any) -> Any:
    """A body that was read, once more; then what comes."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def received() -> Any:
        return waiting.pop() if waiting else await receive()

    return received


def _add(actions: Actions, turns: Turns) -> None:
    """Name the functions inside of a `gr.Blocks`."""

    async def submit(
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
        negative_prompt: str = "",
        strength: float = -1.0,
        lora: str = "",
        lora_scale: float = 1.0,
    ) -> dict:
        """Put an image into the queue and return at once: id, state, place, seconds_left.

        width and height are in pixels, multiples of the side of a token (16 for most models);
        attention is clear, full or both (the image twice, to compare); radius and down_factor are
        in tokens; far is whether every token sees the whole image by far keys, null as the weights
        were made for; image is the name that POST /uploads answered for an image to enlarge;
        strength, from 0 to 1, is how much of it is painted anew; lora is one of the server's. 0,
        -1 and "" mean the model's defaults.
        """
        entry = {
            "prompt": prompt,
            "width": width or None,
            "height": height or None,
            "attention": attention,
            "radius": radius or None,
            "down_factor": down_factor,
            "far": far,
            "steps": steps or None,
            "guidance": None if guidance == -1 else guidance,
            "seed": seed,
            "model": model,
            "image": image,
            "negative_prompt": negative_prompt,
            "strength": None if strength == -1 else strength,
            "lora": lora,
            "lora_scale": lora_scale,
        }
        caller = who_asks(request)
        try:
            async with turns.turn(caller):
                (found,) = await run_in_threadpool(actions.submit, entry, 1, caller)
        except RequestError as error:
            raise _refused(error) from error
        return _public(found)

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
        negative_prompt: str = "",
        strength: float = -1.0,
        lora: str = "",
        lora_scale: float = 1.0,
    ) -> AsyncIterator[dict]:
        """As submit; then tells the status whenever it changes, and last how it ended.

        A client that goes away loses nothing: the image is in its history.
        """
        window = (width, height, attention, radius, down_factor, far)
        more = (model, image, negative_prompt, strength, lora, lora_scale)
        found = await submit(request, prompt, *window, steps, guidance, seed, *more)
        async for news in actions.follow(found["id"], who_asks(request)):
            yield _public(news)

    def status(request: gr.Request, job: str) -> dict:
        """An image's state: waiting, running, done, cancelled, failed or stopped (by a restart of
        the server); and what is known.

        place, seconds_left and fraction while it waits or runs; images with seconds, flops and
        file (to GET with the same cookie) when it is done; error when it failed.
        """
        try:
            return _public(actions.status(str(job), who_asks(request)))
        except RequestError as error:
            raise _refused(error) from error

    def cancel(request: gr.Request, job: str) -> bool:
        """Cancel a waiting or running image; whether it was one."""
        return actions.jobs.cancel(who_asks(request).owner, str(job))

    def history(request: gr.Request) -> list:
        """This visitor's finished images, the newest first."""
        ended = actions.store.history(who_asks(request).owner)
        return [_public(found) for found in ended if found["state"] == "done"]

    for function in (submit, generate, status, cancel, history):
        gr.api(function, api_name=function.__name__, concurrency_limit=None)


def _refused(error: RequestError) -> gr.Error:
    return gr.Error(str(error), print_exception=False)


def _public(found: dict[str, Any]) -> dict[str, Any]:
    images = [
        one | {"file": f"images/{found['id']}/{one['attention']}.png"} for one in found["images"]
    ]
    return found | {"images": images}
