"""The server: its routes in one ASGI application, and running it."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import replace
from functools import partial
from typing import Any

# Before Gradio is imported: it reports to its makers otherwise.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as AnyHTTPException

from ..errors import RequestError
from ..files import own_folder
from ..generation.checks import check_quantize, find_device, find_dtype
from ..generation.dtypes import resolve_dtype
from ..generation.placing import check_offload
from ..generation.runner import PipelineRunner
from .accounts import Accounts
from .actions import Actions
from .connections import MAX_CONNECTIONS, Connection, OneOfMany
from .files import make_files
from .guard import Guard
from .jobs import Jobs
from .login import make_login
from .logs import bound_log
from .programs import make_programs
from .reception import Reception
from .routes import make_routes, not_there, told
from .settings import Settings
from .store import Store
from .turns import Turns

logger = logging.getLogger(__name__)

# Ports that are tried for one to propose.
_PORTS = 20


def make_application(settings: Settings, store: Store, jobs: Jobs) -> Guard:
    """Everything that is served, as an ASGI application; when it is shut down, jobs are ended."""
    actions = Actions(settings, store, jobs)
    accounts = Accounts(settings.auth, settings.out / "logins.json")
    turns = Turns()
    programs = make_programs(actions, turns)

    @asynccontextmanager
    async def lifespan(api: FastAPI) -> AsyncIterator[None]:
        async with programs.engine.router.lifespan_context(programs.engine):
            yield
        # Here, as uvicorn ends the process by the signal it got.
        jobs.stop()

    api = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    api.add_exception_handler(AnyHTTPException, _told_as_json)
    api.add_exception_handler(RequestValidationError, _not_there)
    api.include_router(make_login(settings, accounts))
    api.include_router(make_routes(actions, turns))
    api.include_router(make_files(actions, Reception(settings, store)))
    api.mount("", programs)
    return Guard(api, settings, accounts)


def _told_as_json(request: Request, error: Any) -> Any:
    if error.status_code == 404:
        return not_there()
    return told({"error": str(error.detail), "field": None}, error.status_code)


def _not_there(request: Request, error: Any) -> Any:
    return not_there()


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that listens, before anything is loaded.

    Raises:
        RequestError: the port is taken, and the next one that is free; or there is no such host.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
        made.listen(128)
    except OSError as error:
        made.close()
        free = next((one for one in range(port + 1, port + _PORTS) if _is_free(host, one)), None)
        if free is None or not _is_local_address(host):
            raise RequestError(f"--host {host} --port {port}: {error.strerror}.") from error
        raise RequestError(
            f"--port {port}: {error.strerror}; {free} is free: --port {free}."
        ) from error
    return made


def _is_free(host: str, port: int) -> bool:
    if port > 65535:
        return False
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((host, port))
        except OSError:
            return False
    return True


def _is_local_address(host: str) -> bool:
    return _is_free(host, 0)


def serve(settings: Settings) -> None:
    """Run the server until it is interrupted.

    Raises:
        RequestError: the port is taken, the model cannot be loaded, or the folder belongs to
            another server.
    """
    if not settings.local and not settings.auth:
        logger.warning(
            "%s can be reached from other machines, and there is no --auth: everybody who reaches "
            "it may generate",
            settings.host,
        )
    bound_log()
    with closing(bound_socket(settings.host, settings.port)) as listening, own_folder(settings.out):
        settings = replace(settings, port=listening.getsockname()[1])  # it may have been 0
        store = Store(settings.out)
        device = str(find_device(settings.device))
        dtype = resolve_dtype(settings.dtype, torch.device(device))
        check_quantize(settings.quantize, torch.device(device), find_dtype(dtype))
        check_offload(settings.offload)
        make_runner = partial(PipelineRunner, quantize=settings.quantize, offload=settings.offload)
        jobs = Jobs(settings, store, make_runner)
        jobs.start(settings.models[0], dtype, device)
        application = make_application(settings, store, jobs)
        config = uvicorn.Config(
            application,
            log_config=None,
            access_log=False,
            server_header=False,
            http=Connection if settings.proxy else OneOfMany,
            limit_concurrency=MAX_CONNECTIONS,
            proxy_headers=bool(settings.proxy),
            forwarded_allow_ips=list(settings.proxy),
            timeout_graceful_shutdown=3,
        )
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
        name = f"[{settings.host}]" if ":" in settings.host else settings.host
        print(f"clear-dit app: http://{name}:{settings.port}", flush=True)
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listening])
