"""All that a server answers, as one ASGI application."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException as AnyHTTPException

from .accounts import Accounts
from .actions import Actions
from .files import make_files
from .guard import Guard
from .jobs import Jobs
from .login import make_login
from .metrics import CONTENT_TYPE, Counted, Metrics
from .openai.errors import broken, error_at
from .openai.links import Links
from .openai.routes import make_openai
from .reception import Reception
from .routes import make_routes, not_there, told
from .settings import Settings
from .store import Store
from .turns import Turns


def make_application(settings: Settings, store: Store, jobs: Jobs) -> Counted:
    """OpenAI's image API, health and metrics, and the page where the settings say so.

    When it is shut down, jobs are ended.
    """
    actions, accounts = Actions(settings, store, jobs), Accounts(settings.auth, settings.logins)
    metrics, turns, reception = Metrics(jobs), Turns(), Reception(settings, store)
    programs: Any = None
    if settings.page:
        from .programs import make_programs  # Gradio, which nothing else here needs

        programs = make_programs(actions, turns)

    @asynccontextmanager
    async def lifespan(api: FastAPI) -> AsyncIterator[None]:
        if programs is None:
            yield
        else:
            async with programs.engine.router.lifespan_context(programs.engine):
                yield
        # Here, as uvicorn ends the process by the signal it got.
        jobs.stop()

    api = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    api.add_exception_handler(AnyHTTPException, _told_as_json)
    api.add_exception_handler(RequestValidationError, _not_there)
    api.add_exception_handler(Exception, broken)
    _add_watch(api, jobs, metrics)
    api.mount("/v1", make_openai(actions, reception, turns, Links(store)))
    if programs is not None:
        api.include_router(make_login(settings, accounts))
        api.include_router(make_routes(actions, turns))
        api.include_router(make_files(actions, reception))
        api.mount("", programs)
    return Counted(Guard(api, settings, accounts), metrics)


def _add_watch(api: FastAPI, jobs: Jobs, metrics: Metrics) -> None:
    """What those who run a server ask it."""

    @api.get("/health")
    async def health() -> Response:
        alive = jobs.alive
        return told({"status": "ok" if alive else "stopping"}, 200 if alive else 503)

    @api.get("/metrics")
    def all_metrics() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)


def _told_as_json(request: Request, error: Any) -> Response:
    path, status = request.scope["path"], error.status_code
    words = "There is no such page or image." if status == 404 else str(error.detail)
    answer = told(error_at(path, status, words), status)
    answer.headers.update(error.headers or {})
    return answer


def _not_there(request: Request, error: Any) -> Response:
    return not_there()
