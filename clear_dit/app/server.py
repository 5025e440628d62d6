"""Running a server: with the web page, or for programs only."""

from __future__ import annotations

import logging
import socket
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial

import torch
import uvicorn

from ..errors import RequestError
from ..files import own_folder
from ..generation.checks import check_quantize, find_device, find_dtype
from ..generation.dtypes import resolve_dtype
from ..generation.placing import check_offload
from ..generation.runner import PipelineRunner
from .application import make_application
from .connections import MAX_CONNECTIONS, Connection, OneOfMany
from .jobs import Jobs
from .logs import bound_log
from .settings import Settings
from .store import Store

logger: logging.Logger = logging.getLogger(__name__)

# Ports that are tried for one to propose.
_PORTS = 20


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
    command, where, ask = ("app", "", "--auth") if settings.page else ("serve", "/v1", "--api-key")
    if not settings.local and not (settings.auth or settings.keys):
        logger.warning(
            "%s can be reached from other machines, and there is no %s: everybody who reaches "
            "it may generate",
            settings.host,
            ask,
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
        print(f"clear-dit {command}: http://{name}:{settings.port}{where}", flush=True)
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listening])
