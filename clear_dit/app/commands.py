"""The command `clear-dit app`; its work is imported when it runs."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from .. import options
from ..errors import RequestError


def serve_app(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="demo (the default), a folder in diffusers format, or a hub repository, such as "
            "Qwen/Qwen-Image; repeatable: the first is loaded at once, visitors "
            "choose."
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on, such as 0.0.0.0.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on, such as 7860.")] = 7860,
    auth: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME:PASSWORD that may come in, such as anna:s3cret; repeatable.",
            envvar="CLEAR_DIT_AUTH",
            show_envvar=True,
        ),
    ] = None,
    proxy: Annotated[
        list[str] | None,
        typer.Option(
            help="Address of a reverse proxy, such as 127.0.0.1, that is believed where requests "
            "come from (X-Forwarded-For, X-Forwarded-Proto); repeatable."
        ),
    ] = None,
    loras: Annotated[
        Path | None,
        typer.Option(help="A folder of .safetensors LoRA files to choose from, such as loras."),
    ] = None,
    max_pixels: Annotated[
        int, typer.Option(help="The most of an image, width times height, such as 4194304.")
    ] = 8192**2,
    queue_size: Annotated[int, typer.Option(help="Images that may wait, such as 16.")] = 16,
    keep_days: Annotated[
        float, typer.Option(help="Days after which images are removed, such as 7.")
    ] = 7.0,
    out: Annotated[
        Path, typer.Option(help="The folder for images, such as images; made if missing.")
    ] = Path("clear-dit-app"),
    upscaler: options.Upscaler = None,
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    offload: options.Offload = "none",
    device: options.Device = None,
) -> None:
    """Serve the web page."""
    from .settings import Settings, parse_auth

    settings = Settings(
        models=tuple(model or ["demo"]),
        out=out,
        host=host,
        port=port,
        auth=tuple(map(parse_auth, auth or [])),
        proxy=tuple(proxy or []),
        loras=loras,
        max_pixels=max_pixels,
        queue_size=queue_size,
        keep_days=keep_days,
        dtype=dtype,
        quantize=quantize,
        offload=offload,
        device=device,
        upscaler=upscaler,
    )
    if find_spec("gradio") is None:
        raise RequestError("the web page needs Gradio: pip install 'clear-dit[app]'.")
    from .server import serve

    serve(settings)
