"""The commands `clear-dit app` and `clear-dit serve`; their work is imported when they run."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import options
from ..errors import RequestError

Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        help="demo (the default), a folder in diffusers format, or a hub repository, such as "
        "Qwen/Qwen-Image; repeatable: the first is loaded at once, those who ask choose.",
    ),
]
Host = Annotated[str, typer.Option(help="Address to listen on, such as 0.0.0.0.")]
Port = Annotated[int, typer.Option(help="Port to listen on, such as 7860.")]
Keys = Annotated[
    list[str] | None,
    typer.Option(
        "--api-key",
        help="A key that lets programs in, such as 9f2c41d7a0b35e68; repeatable.",
        envvar="CLEAR_DIT_API_KEY",
        show_envvar=True,
    ),
]
Proxies = Annotated[
    list[str] | None,
    typer.Option(
        "--proxy",
        help="Address of a reverse proxy, such as 127.0.0.1, that is believed where requests "
        "come from (X-Forwarded-For, X-Forwarded-Proto); repeatable.",
    ),
]
Loras = Annotated[
    Path | None,
    typer.Option(help="A folder of .safetensors LoRA files to choose from, such as loras."),
]
MaxPixels = Annotated[
    int, typer.Option(help="The most of an image, width times height, such as 4194304.")
]
QueueSize = Annotated[int, typer.Option(help="Images that may wait, such as 16.")]
KeepDays = Annotated[float, typer.Option(help="Days after which images are removed, such as 7.")]
Out = Annotated[Path, typer.Option(help="The folder for images, such as images; made if missing.")]
# Of images that nobody asked for in the end. Longer than a request takes: its first image waits for
# the last.
_KEEP_DAYS = 1.0


def serve_app(
    models: Models = None,
    host: Host = "127.0.0.1",
    port: Port = 7860,
    auth: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME:PASSWORD that may come in, such as anna:s3cret; repeatable.",
            envvar="CLEAR_DIT_AUTH",
            show_envvar=True,
        ),
    ] = None,
    keys: Keys = None,
    proxies: Proxies = None,
    loras: Loras = None,
    max_pixels: MaxPixels = 8192**2,
    queue_size: QueueSize = 16,
    keep_days: KeepDays = 7.0,
    out: Out = Path("clear-dit-app"),
    upscaler: options.Upscaler = None,
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    offload: options.Offload = "none",
    device: options.Device = None,
) -> None:
    """Serve the web page, and OpenAI's image API."""
    from .settings import parse_auth

    _serve(
        "the web page needs Gradio: pip install 'clear-dit[app]'.",
        ("gradio", "prometheus_client"),
        models=tuple(models or ["demo"]),
        out=out,
        host=host,
        port=port,
        auth=tuple(map(parse_auth, auth or [])),
        keys=tuple(keys or []),
        proxy=tuple(proxies or []),
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


def serve_programs(
    models: Models = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    keys: Keys = None,
    proxies: Proxies = None,
    loras: Loras = None,
    max_pixels: MaxPixels = 8192**2,
    queue_size: QueueSize = 16,
    out: Out = Path("clear-dit-serve"),
    upscaler: options.Upscaler = None,
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    offload: options.Offload = "none",
    device: options.Device = None,
) -> None:
    """Serve OpenAI's image API, for programs."""
    _serve(
        "the server needs FastAPI and more: pip install 'clear-dit[serve]'.",
        ("fastapi", "uvicorn", "python_multipart", "prometheus_client"),
        page=False,
        models=tuple(models or ["demo"]),
        out=out,
        host=host,
        port=port,
        keys=tuple(keys or []),
        proxy=tuple(proxies or []),
        loras=loras,
        max_pixels=max_pixels,
        queue_size=queue_size,
        keep_days=_KEEP_DAYS,
        dtype=dtype,
        quantize=quantize,
        offload=offload,
        device=device,
        upscaler=upscaler,
    )


def _serve(missing: str, needed: tuple[str, ...], **settings: Any) -> None:
    from .settings import Settings

    checked = Settings(**settings)
    if any(find_spec(name) is None for name in needed):
        raise RequestError(missing)
    from .server import serve

    serve(checked)
