"""What is served from the disk: a caller's own images, tiles and uploads, and the page itself."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from fastapi import APIRouter, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect

from ..errors import RequestError
from .actions import Actions, NotThereError
from .caller import who_asks
from .downloads import FORMATS, file_name, zipped
from .reception import Reception
from .routes import refusal, told
from .store import SOURCE
from .tiles import TILE
from .turns import Turns

STATIC = Path(__file__).parent / "static"
# Names never mean another content: browsers may keep it, shared caches may not.
KEEP = {"cache-control": "private, max-age=604800, immutable"}
FRESH = {"cache-control": "no-cache"}
Which = Literal["clear", "full"]
Upload = Literal["clear", "full", "image"]
_STATIC_NAME = re.compile(r"[a-z-]+(\.min)?\.(js|css|txt|svg)")


def make_files(actions: Actions, reception: Reception) -> APIRouter:
    """The routes: what is not the caller's is not there, 404."""
    router = APIRouter()
    store = actions.store
    # Who waits for an image to be converted holds none of the threads that answer others.
    conversions = Turns()

    def own(request: Request, job: str, *parts: str) -> Path:
        path = store.file(who_asks(request).owner, job, *parts)
        if path is None:
            raise HTTPException(404)
        return path

    def finished(request: Request, job: str, which: str, kind: str) -> tuple[Path, str]:
        """An image's PNG, and what it is called where it is saved as another kind."""
        path = own(request, job, f"{which}.png")
        try:
            return path, file_name(actions.status(job, who_asks(request)), which, kind)
        except NotThereError as error:  # deleted meanwhile
            raise HTTPException(404) from error

    @router.get("/")
    def page() -> Response:
        return FileResponse(STATIC / "index.html", headers=FRESH)

    @router.get("/static/{name}")
    def static(name: str) -> Response:
        if not _STATIC_NAME.fullmatch(name) or not (STATIC / name).is_file():
            raise HTTPException(404)
        return FileResponse(STATIC / name, headers=FRESH)

    @router.get("/view/{job}")
    def view(request: Request, job: str) -> Response:
        if store.folder(who_asks(request).owner, job) is None:
            raise HTTPException(404)
        return FileResponse(STATIC / "viewer.html", headers=FRESH)

    @router.get("/images.zip")
    def archive(request: Request) -> Response:
        found = zipped(store, who_asks(request).owner)
        name = {"content-disposition": 'attachment; filename="clear-dit.zip"'}
        return StreamingResponse(found, media_type="application/zip", headers=name)

    @router.get("/images/{job}")
    def record(request: Request, job: str) -> Response:
        try:
            return told(actions.status(job, who_asks(request)) | {"tile": TILE})
        except NotThereError as error:
            return refusal(error)

    @router.get("/images/{job}/{which}.{kind}")
    async def image(request: Request, job: str, which: Which, kind: str) -> Response:
        if kind != "png" and kind not in FORMATS:
            raise HTTPException(404)
        path, name = await run_in_threadpool(finished, request, job, which, kind)
        if kind in FORMATS:
            try:
                async with conversions.turn(who_asks(request)):
                    path = await reception.convert(path, kind)
            except RequestError as error:
                return refusal(error)
            except FileNotFoundError as error:  # deleted meanwhile
                raise HTTPException(404) from error
        return FileResponse(path, headers=KEEP, filename=name)

    @router.get("/images/{job}/{which}/{level}/{column}_{row}.jpg")
    def tile(
        request: Request, job: str, which: Which, level: int, column: int, row: int
    ) -> Response:
        path = own(request, job, f"{which}_files", str(level), f"{column}_{row}.jpg")
        return FileResponse(path, headers=KEEP)

    @router.get("/uploads/{name}.jpg")
    def small_upload(request: Request, name: str) -> Response:
        path = store.small_upload(who_asks(request).owner, name)
        if path is None:
            raise HTTPException(404)
        return FileResponse(path, headers=KEEP)

    @router.post("/uploads")
    async def upload(request: Request) -> Response:
        length = request.headers.get("content-length", "")
        known = int(length) if length.isdecimal() else None
        try:
            return told(await reception.receive(request.stream(), known, who_asks(request)))
        except RequestError as error:
            return refusal(error)
        except ClientDisconnect:
            return told(None, 400)

    @router.post("/api/jobs/{job}/{which}/upload")
    async def reuse(request: Request, job: str, which: Upload) -> Response:
        name = SOURCE if which == "image" else f"{which}.png"
        path = own(request, job, name)
        try:
            return told(await run_in_threadpool(reception.copy, path, who_asks(request)))
        except RequestError as error:
            return refusal(error)

    return router
