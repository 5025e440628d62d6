"""The page's routes: JSON in, JSON out. See `files` for what is served from the disk."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response

from ..errors import RequestError
from .actions import Actions, NotThereError
from .caller import who_asks
from .entry import EntryError
from .jobs import LimitError
from .offer import offer
from .settings import MAX_BODY_BYTES
from .store import NoRoomError
from .turns import Turns

# Seconds in which the body of a request has to come.
PATIENCE = 30.0


class BodyError(RequestError):
    """What was sent is at fault; `status` of the answer says how."""

    def __init__(self, words: str, status: int = 400) -> None:
        super().__init__(words)
        self.status = status


def status_and_headers(error: RequestError) -> tuple[int, dict[str, str]]:
    """What the answer to a refused request begins with, whatever its body is; no cache keeps it."""
    if isinstance(error, BodyError):
        status = error.status
    elif isinstance(error, NotThereError):
        status = 404
    elif isinstance(error, NoRoomError):
        status = 503
    else:
        status = 429 if isinstance(error, LimitError) else 400
    headers = {"cache-control": "no-store"}
    if isinstance(error, LimitError):
        headers["retry-after"] = str(math.ceil(error.seconds))
    return status, headers


def refusal(error: RequestError) -> Response:
    """An error as all routes tell it: {"error": words, "field": of the entry, or null}."""
    status, headers = status_and_headers(error)
    field = error.field if isinstance(error, EntryError) else None
    return JSONResponse({"error": str(error), "field": field}, status, headers)


def not_there() -> Response:
    """A path that leads to nothing."""
    return told({"error": "There is no such page or image.", "field": None}, 404)


def told(content: Any, status: int = 200) -> Response:
    """JSON that no cache keeps."""
    return JSONResponse(content, status, headers={"cache-control": "no-store"})


async def read_body(receive: Any, limit: int = MAX_BODY_BYTES) -> bytes:
    """The body of a request.

    Raises:
        BodyError: it is larger, or comes too slowly.
    """
    try:
        async with asyncio.timeout(PATIENCE):
            return await _read(receive, limit)
    except TimeoutError as error:
        raise BodyError("The request came too slowly.", 408) from error


async def _read(receive: Any, limit: int) -> bytes:
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise BodyError("The request was cut off.")
        body += message.get("body", b"")
        if len(body) > limit:
            raise BodyError(f"The request has more than {limit // 1024} KiB.", 413)
        if not message.get("more_body"):
            return body


def parse_object(body: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        BodyError: it is something else.
    """
    try:
        found = json.loads(body)
        json.dumps(found, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise BodyError("The request is not JSON.") from error
    if not isinstance(found, dict):
        raise BodyError("The request must be a JSON object.")
    return found


def make_routes(actions: Actions, turns: Turns) -> APIRouter:
    """The routes below api/."""
    router = APIRouter(prefix="/api")

    async def answered(request: Request, act: Callable[[], Any]) -> Response:
        """What an action returns, or why it is refused; on a thread, as it may take a while."""
        try:
            async with turns.turn(who_asks(request)):
                return told(await run_in_threadpool(act))
        except RequestError as error:
            return refusal(error)

    async def with_body(request: Request, act: Callable[[dict[str, Any]], Any]) -> Response:
        try:
            body = parse_object(await read_body(request.receive))
        except RequestError as error:
            return refusal(error)
        return await answered(request, lambda: act(body))

    @router.get("/setup")
    async def setup(request: Request) -> Response:
        return await answered(request, lambda: offer(actions, who_asks(request)))

    @router.post("/estimate")
    async def estimate(request: Request, images: int = 1) -> Response:
        caller = who_asks(request)
        return await with_body(request, lambda entry: actions.estimate(entry, images, caller))

    @router.get("/jobs")
    async def jobs(request: Request) -> Response:
        caller = who_asks(request)
        found = await run_in_threadpool(actions.all, caller)
        body = json.dumps({"jobs": found, "waiting": actions.jobs.waiting}).encode()
        tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        headers = {"etag": tag, "cache-control": "no-cache"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(body, media_type="application/json", headers=headers)

    @router.post("/jobs")
    async def submit(request: Request) -> Response:
        caller = who_asks(request)

        def act(body: dict[str, Any]) -> dict[str, Any]:
            name = body.get("image_name")
            name = name if isinstance(name, str) and name else "image"
            found = actions.submit(body.get("entry"), body.get("images", 1), caller, name)
            return {"jobs": found}

        return await with_body(request, act)

    @router.post("/jobs/{job}/cancel")
    async def cancel(request: Request, job: str) -> Response:
        caller = who_asks(request)
        return await answered(
            request, lambda: {"cancelled": actions.jobs.cancel(caller.owner, job)}
        )

    @router.post("/jobs/{job}/again")
    async def again(request: Request, job: str) -> Response:
        caller = who_asks(request)
        return await answered(request, lambda: {"jobs": actions.again(job, caller)})

    @router.put("/jobs/{job}/favourite")
    async def favourite(request: Request, job: str) -> Response:
        caller = who_asks(request)

        def act(body: dict[str, Any]) -> dict[str, Any]:
            wanted = body.get("favourite") is True
            if not actions.store.set_favourite(caller.owner, job, wanted):
                raise NotThereError("There is no such finished image of yours.")
            return {"favourite": wanted}

        return await with_body(request, act)

    @router.delete("/jobs/{job}")
    async def remove(request: Request, job: str) -> Response:
        return await answered(request, lambda: actions.remove(job, who_asks(request)))

    return router
