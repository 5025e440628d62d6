"""What is served from the disk: a visitor's own images, tiles and uploads, and the viewer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, JSONResponse, Response

from ..errors import RequestError
from .guard import visitor
from .settings import MAX_UPLOAD_BYTES
from .store import Store
from .tiles import TILE
from .uploads import keep_upload

STATIC = Path(__file__).parent / "static"
# Names never mean another content: browsers may keep it, shared caches may not.
KEEP = {"cache-control": "private, max-age=604800, immutable"}
Which = Literal["clear", "full"]


def make_router(store: Store) -> APIRouter:
    """The routes.

    GET images/JOB: what is known of a job, JSON; images/JOB/clear.png or full.png: the file;
    images/JOB/clear/LEVEL/COLUMN_ROW.jpg: its tiles; view/JOB: a page with the zoomable viewer;
    viewer/FILE: what that page consists of. POST uploads: an image as the body, of which the
    answer tells the name. What is not the visitor's is not there: 404.
    """
    router = APIRouter()

    def own_folder(request: Request, job: str) -> Path:
        folder = store.folder(visitor(request.cookies), job)
        if folder is None:
            raise HTTPException(404)
        return folder

    @router.get("/images/{job}")
    def record(request: Request, job: str) -> Response:
        own_folder(request, job)
        found = store.read(visitor(request.cookies), job)
        return JSONResponse((found or {}) | {"tile": TILE})

    @router.get("/images/{job}/{which}.png")
    def image(request: Request, job: str, which: Which) -> Response:
        path = own_folder(request, job) / f"{which}.png"
        name = f"clear-dit-{job[:6]}-{which}.png"
        return _file(path, filename=name)

    @router.get("/images/{job}/{which}/{level}/{column}_{row}.jpg")
    def tile(
        request: Request, job: str, which: Which, level: int, column: int, row: int
    ) -> Response:
        path = own_folder(request, job) / f"{which}_files" / str(level) / f"{column}_{row}.jpg"
        return _file(path)

    @router.get("/view/{job}")
    def view(request: Request, job: str) -> Response:
        own_folder(request, job)
        return FileResponse(STATIC / "viewer.html")

    @router.get("/viewer/{name}")
    def static(name: str) -> Response:
        if not re.fullmatch(r"[a-z-]+(\.min)?\.(js|css|txt)", name):
            raise HTTPException(404)
        if not (STATIC / name).is_file():
            raise HTTPException(404)
        return FileResponse(STATIC / name, headers={"cache-control": "no-cache"})

    @router.post("/uploads")
    async def upload(request: Request) -> Response:
        path = await run_in_threadpool(store.new_upload, visitor(request.cookies))
        try:
            await _receive(request, path)
            width, height = await run_in_threadpool(keep_upload, path)
        except RequestError as error:
            path.unlink(missing_ok=True)
            return JSONResponse({"error": str(error)}, status_code=400)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return JSONResponse({"name": path.name, "width": width, "height": height})

    return router


def _file(path: Path, **options: Any) -> Response:
    if not path.is_file():
        raise HTTPException(404)
    return FileResponse(path, headers=KEEP, **options)


async def _receive(request: Request, path: Path) -> None:
    size = 0
    with path.open("wb") as file:
        async for block in request.stream():
            size += len(block)
            if size > MAX_UPLOAD_BYTES:
                raise RequestError(
                    f"The image has more than {MAX_UPLOAD_BYTES // 2**20} MiB; take a smaller one."
                )
            file.write(block)
