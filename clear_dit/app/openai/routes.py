"""The routes below /v1, an application of their own: its OpenAPI document is /v1/openapi.json."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.exceptions import HTTPException as AnyHTTPException

from ...errors import RequestError
from ...versions import __version__
from ..actions import Actions
from ..caller import for_one_request, who_asks
from ..reception import Reception
from ..routes import read_body
from ..turns import Turns
from .answers import Pieces, event, event_with_file, with_file
from .errors import ErrorAnswer, FailedError, ParamError, broken, error_body, refused
from .fields import ImageRequest, ImagesAnswer, ModelAnswer, ModelsAnswer, parse
from .forms import read_form
from .links import PREFIX, Links
from .orders import Images

_FRESH = {"cache-control": "no-store"}
# Seconds without news after which a line says that the connection is still there.
_SILENCE = 15.0
# Clients with strict types need it; no tokens are counted here.
_USAGE = {
    "total_tokens": 0,
    "input_tokens": 0,
    "output_tokens": 0,
    "input_tokens_details": {"text_tokens": 0, "image_tokens": 0},
}
_TELLS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": words}
    for status, words in (
        (400, "The request is refused."),
        (401, "The key is missing or wrong."),
        (404, "There is no such model."),
        (408, "The request came too slowly."),
        (413, "The request is too large."),
        (429, "The queue is full; Retry-After says when to try again."),
        (500, "The image could not be made."),
        (503, "The server is being stopped."),
    )
}
_ONE_MODEL: dict[int | str, dict[str, Any]] = {code: _TELLS[code] for code in (401, 404)}
_EVENT = {
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "description": "Each event; its data is JSON, see the page on servers.",
}
_IMAGES: dict[int | str, dict[str, Any]] = {
    200: {
        "model": ImagesAnswer,
        "description": "The images; with stream, events.",
        "content": {"text/event-stream": {"schema": _EVENT}},
    },
    **_TELLS,
}
_FORM: dict[int | str, dict[str, Any]] = {
    **_IMAGES,
    415: {"model": ErrorAnswer, "description": "The request is no form."},
}


def make_openai(actions: Actions, reception: Reception, turns: Turns, links: Links) -> FastAPI:
    """OpenAI's image API, to be mounted at /v1.

    Args:
        actions, reception, turns: of the server.
        links: of the server; their route asks for no key.
    """
    settings = actions.settings
    locked = bool(settings.keys or settings.auth)
    api = FastAPI(
        title="clear-dit",
        summary="OpenAI's image API, up to 8K",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        root_path_in_servers=False,
        servers=[{"url": "/v1"}],
    )
    api.add_exception_handler(AnyHTTPException, _told)
    api.add_exception_handler(Exception, broken)
    if locked:
        _ask_for_key(api)

    def images(request: Request, given: ImageRequest) -> Images:
        return Images(actions, reception, turns, for_one_request(who_asks(request)), given)

    async def answered(request: Request, made: Images, kind: str) -> Response:
        """The images of a request that is in the queue."""
        if made.given.stream:
            return Pieces(_events(made, kind), "text/event-stream", made.end)
        try:
            for number in range(len(made.jobs)):
                async for _ in made.follow(number):
                    if await request.is_disconnected():
                        made.end()
                        return Response(status_code=400)  # which nobody reads
            files = [await made.file(number) for number in range(len(made.jobs))]
            head = _head(made)
            if made.given.response_format == "url":
                data = []
                for number, file in enumerate(files):
                    name = links.add(*made.owner_and_job(number), file.name)
                    url = f"{request.url_for('file', name=name, kind=file.suffix[1:])}"
                    data.append({"url": url, "seed": _seed(made, number)})
                return JSONResponse(head | {"data": data}, headers=_FRESH)
        except BaseException:
            made.end()
            raise
        return Pieces(_json(made, head, files), "application/json", made.end)

    @api.post(
        "/images/generations",
        responses=_IMAGES,
        openapi_extra=_body("application/json", ImageRequest.model_json_schema()),
    )
    async def generate(request: Request) -> Response:
        """Images of a prompt."""
        try:
            links.sweep()
            given = parse(ImageRequest, await read_body(request.receive))
            made = images(request, given)
            await made.order()
            return await answered(request, made, "image_generation")
        except (RequestError, FailedError) as error:
            return refused(error)

    @api.post(
        "/images/edits",
        responses=_FORM,
        openapi_extra=_body("multipart/form-data", _with_image(ImageRequest.model_json_schema())),
    )
    async def edit(request: Request) -> Response:
        """Images that repaint another, at its size or a larger one."""
        caller = who_asks(request)
        try:
            links.sweep()
            with reception.place(caller):
                async with read_form(request) as form:
                    given = parse(ImageRequest, form.fields)
                    made = images(request, given)
                    upload = await reception.keep(form.blocks(), made.caller)
                    name = form.name
            try:
                await made.order(upload, name)
            finally:
                path = actions.store.upload(made.caller.owner, upload["name"])
                if path is not None:
                    actions.store.forget(path)
            return await answered(request, made, "image_edit")
        except (RequestError, FailedError) as error:
            return refused(error)

    @api.get("/models", response_model=ModelsAnswer, responses={401: _TELLS[401]})
    def models() -> Response:
        """The server's models."""
        found = ModelsAnswer(data=[ModelAnswer(id=name) for name in settings.models])
        return JSONResponse(found.model_dump(), headers=_FRESH)

    @api.get("/models/{model:path}", response_model=ModelAnswer, responses=_ONE_MODEL)
    def one_model(model: str) -> Response:
        """One of them."""
        if model not in settings.models:
            return refused(ParamError("There is no such model.", "model", 404, "model_not_found"))
        return JSONResponse(ModelAnswer(id=model).model_dump(), headers=_FRESH)

    @api.get(f"{PREFIX.removeprefix('/v1')}{{name}}.{{kind}}", include_in_schema=False)
    def file(name: str, kind: str) -> Response:
        path = links.find(name)
        if path is None or path.suffix != f".{kind}":
            raise HTTPException(404, "There is no such image; its URL held for an hour.")
        # Pages of other sites show it: who knows its URL may.
        shown = {"cross-origin-resource-policy": "cross-origin"}
        return FileResponse(path, headers={"cache-control": "private, no-store"} | shown)

    return api


def _told(request: Request, error: Any) -> Response:
    words = error.detail if isinstance(error.detail, str) else "The request is refused."
    if error.status_code == 404 and words == "Not Found":
        words = "There is no such route: see /v1/openapi.json."
    return JSONResponse(error_body(error.status_code, words), error.status_code, error.headers)


def _head(made: Images) -> dict[str, Any]:
    return {
        "created": int(time.time()),
        "size": made.size,
        "output_format": made.given.output_format or "png",
        "background": "opaque",
    }


def _seed(made: Images, number: int) -> int:
    return int(made.jobs[number]["entry"]["seed"])


async def _json(made: Images, head: dict[str, Any], files: list[Path]) -> AsyncIterator[bytes]:
    """The answer with all images inside."""
    yield json.dumps(head)[:-1].encode() + b', "data": ['
    for number, file in enumerate(files):
        yield b", " if number else b""
        async for piece in with_file({"seed": _seed(made, number)}, file):
            yield piece
    yield b"]}"


async def _events(made: Images, kind: str) -> AsyncIterator[bytes]:
    """Previews and images as they come."""
    partial = made.given.partial_images or 0
    try:
        for number in range(len(made.jobs)):
            sent, told = 0, time.monotonic()
            async for found in made.follow(number):
                due = (sent + 1) / (partial + 1)
                if sent < partial and found["preview"] and found["fraction"] >= due:
                    yield event(f"{kind}.partial_image", _partial(made, kind, found, sent))
                    sent, told = sent + 1, time.monotonic()
                elif time.monotonic() - told > _SILENCE:
                    yield b": still at work\n\n"
                    told = time.monotonic()
            name = f"{kind}.completed"
            content = _event_head(made, name) | {"seed": _seed(made, number), "usage": _USAGE}
            async for piece in event_with_file(name, content, await made.file(number)):
                yield piece
    except (RequestError, FailedError) as error:
        status = getattr(error, "status", 400)
        yield event("error", {"type": "error"} | error_body(status, str(error)))


def _event_head(made: Images, name: str) -> dict[str, Any]:
    return {
        "type": name,
        "created_at": int(time.time()),
        "size": made.size,
        "output_format": made.given.output_format or "png",
        "background": "opaque",
        "quality": "auto",
    }


def _partial(made: Images, kind: str, found: dict[str, Any], index: int) -> dict[str, Any]:
    head = _event_head(made, f"{kind}.partial_image") | {"output_format": "jpeg"}
    return head | {"b64_json": found["preview"].partition(",")[2], "partial_image_index": index}


def _body(kind: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {kind: {"schema": schema}}}}


def _with_image(schema: dict[str, Any]) -> dict[str, Any]:
    """The same for a form."""
    image = {"type": "string", "format": "binary", "description": "A PNG, JPEG or WebP."}
    return schema | {
        "title": "EditImageRequest",
        "properties": {"image": image} | schema["properties"],
        "required": ["image", *schema["required"]],
    }


def _ask_for_key(api: FastAPI) -> None:
    """Say in the document that every route asks for a key."""
    made = api.openapi

    def openapi() -> dict[str, Any]:
        found = made()
        scheme = {"type": "http", "scheme": "bearer"}
        found.setdefault("components", {})["securitySchemes"] = {"key": scheme}
        found["security"] = [{"key": []}]
        return found

    api.openapi = openapi  # type: ignore[method-assign]
