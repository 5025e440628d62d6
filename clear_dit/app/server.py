"""The server: its routes and page in one ASGI application, and running it."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

# Before Gradio is imported: it reports to its makers otherwise.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
import torch
import uvicorn
from fastapi import FastAPI

from ..files import own_folder
from ..generation.checks import check_quantize, find_device, find_dtype
from ..generation.dtypes import resolve_dtype
from ..generation.placing import check_offload
from ..generation.runner import PipelineRunner
from .actions import Actions
from .files import STATIC, make_router
from .guard import Guard
from .jobs import Jobs
from .page import make_page
from .settings import Settings
from .store import Store

logger = logging.getLogger(__name__)


def make_application(settings: Settings, store: Store, jobs: Jobs) -> Any:
    """Everything that is served, as an ASGI application; when it is shut down, jobs are ended."""

    @asynccontextmanager
    async def lifespan(api: FastAPI) -> AsyncIterator[None]:
        yield
        # Here, as uvicorn ends the process by the signal it got.
        jobs.stop()

    api = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    api.include_router(make_router(store))
    page = make_page(Actions(settings, store, jobs))
    gr.mount_gradio_app(
        api,
        page,
        path="/",
        server_name=settings.host,
        server_port=settings.port,
        auth=list(settings.auth) or None,
        allowed_paths=[],
        show_error=True,
        footer_links=["api"],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        max_file_size=0,
        theme=gr.themes.Default(
            primary_hue="indigo",
            font=["system-ui", "sans-serif"],
            font_mono=["ui-monospace", "monospace"],
        ),
        css=(STATIC / "page.css").read_text(),
    )
    return Guard(api)


def serve(settings: Settings) -> None:
    """Run the server until it is interrupted.

    Raises:
        RequestError: the model cannot be loaded, or the folder belongs to another server.
        OSError: the port is taken.
    """
    if not settings.local and not settings.auth:
        logger.warning(
            "%s can be reached from other machines, and there is no --auth: everybody who reaches "
            "it may generate",
            settings.host,
        )
    with own_folder(settings.out):
        store = Store(settings.out)
        device = str(find_device(settings.device))
        dtype = resolve_dtype(settings.dtype, torch.device(device))
        check_quantize(settings.quantize, torch.device(device), find_dtype(dtype))
        check_offload(settings.offload)
        make_runner = partial(PipelineRunner, quantize=settings.quantize, offload=settings.offload)
        jobs = Jobs(settings, store, make_runner)
        jobs.start(settings.models[0], dtype, device)
        application = make_application(settings, store, jobs)
        print(f"clear-dit app: http://{settings.host}:{settings.port}", flush=True)
        with suppress(KeyboardInterrupt):
            uvicorn.run(
                application,
                host=settings.host,
                port=settings.port,
                log_level="warning",
                timeout_graceful_shutdown=3,
            )
