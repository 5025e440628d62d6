"""What the server was started with, and the bounds of what visitors may ask for."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from ..errors import RequestError
from ..generation.checks import Bounds, check_upscaler, take_numbers
from ..generation.dtypes import AUTO
from ..generation.models import find_model
from .keys import check_keys

# Of a prompt, in characters: text encoders read some hundred tokens.
MAX_PROMPT = 2000
MAX_STEPS = 100
# Full attention is quadratic: above this many pixels a single job would take the server for hours.
MAX_FULL_PIXELS = 4096 * 4096
# Of one click.
MAX_IMAGES = 4
# Jobs that wait or run, of an account or a visitor: see also `Settings.most_of_party`.
MAX_JOBS = 6
# Of an uploaded image; and the memory for decoding it, which its header tells.
MAX_UPLOAD_BYTES = 64 * 2**20
MAX_UPLOAD_PIXELS = 8192 * 8192
MAX_DECODE_BYTES = 400 * 2**20
# Uploads that are received or wait to be decoded: of an account or an address, and in all.
MAX_UPLOADING = 4
MAX_UPLOADING_IN_ALL = 12
# Uploads that are kept: of an account or a visitor, and of all visitors of an address, of whom the
# oldest go; and of all.
MAX_UPLOADS = 8
MAX_UPLOADS_OF_ADDRESS = 32
MAX_UPLOADS_IN_ALL = 400
# Left free on the disk.
MIN_FREE_BYTES = 2**30
# Of the JSON of a request.
MAX_BODY_BYTES = 2**16
_BOUNDS: dict[str, Bounds] = {"port": (0, 65535), "max_pixels": (256 * 256,), "queue_size": (1,)}


@dataclass(frozen=True)
class Settings:
    """Complete and checked.

    Attributes:
        models: see `GenerateRequest.model`; the first is loaded at once, others when asked for.
        out: the folder for images; nothing outside of it is served.
        host, port: to listen on.
        auth: pairs of name and password; none to let everybody in who reaches the port.
        keys: that let programs in; with them, or with `auth`, nobody else.
        page: whether the web page is served, besides OpenAI's image API.
        proxy: addresses of reverse proxies, which are believed whom a request comes from.
        loras: a folder whose .safetensors files visitors may choose from; None for none.
        max_pixels: of an image.
        queue_size: jobs that may wait besides the one that runs.
        keep_days: images older than this are removed.
        dtype, device: see `GenerateRequest`; a device of None for the best.
        quantize, offload, upscaler: of all images, see `GenerateRequest`.

    Raises:
        RequestError: the first thing that is wrong.
    """

    models: tuple[str, ...]
    out: Path
    host: str = "127.0.0.1"
    port: int = 7860
    auth: tuple[tuple[str, str], ...] = ()
    keys: tuple[str, ...] = ()
    page: bool = True
    proxy: tuple[str, ...] = ()
    loras: Path | None = None
    max_pixels: int = 8192 * 8192
    queue_size: int = 16
    keep_days: float = 7.0
    dtype: str = AUTO
    quantize: str | None = None
    offload: str = "none"
    device: str | None = None
    upscaler: str | None = None

    def __post_init__(self) -> None:
        if not self.models:
            raise RequestError("--model: name at least one.")
        for model in self.models:
            find_model(model)
        take_numbers(self, _BOUNDS)
        if not self.keep_days > 0:
            raise RequestError(f"--keep-days must be over 0, got {self.keep_days:g}.")
        names = [name for name, _ in self.auth]
        if len(set(names)) < len(names):
            raise RequestError("--auth: every name once.")
        check_keys(self.keys)
        if self.page and self.keys and not self.auth:
            raise RequestError(
                "--api-key: nobody could open the page, as a browser sends no key; give --auth, "
                "too, or serve without the page: clear-dit serve."
            )
        if self.upscaler is not None:
            check_upscaler(self.upscaler)
        if self.loras is not None and not self.loras.is_dir():
            raise RequestError(f"--loras: there is no folder {self.loras}.")

    @property
    def logins(self) -> Path:
        """The file in which logins outlast a restart."""
        return self.out / "logins.json"

    @property
    def cookie(self) -> str:
        """The name of its cookie: browsers send those of all ports of a machine to each."""
        return f"clear-dit-{self.port}"

    @property
    def most_of_party(self) -> int:
        """How many jobs of an account, a key or an address may wait or run.

        All that have a place where nobody else can come, else about half.
        """
        alone = len(self.keys) + len(self.auth) == 1 or (self.local and not self.proxy)
        return self.queue_size + 1 if alone else max(MAX_JOBS, self.queue_size // 2)

    @property
    def local(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def parse_auth(text: str) -> tuple[str, str]:
    """NAME:PASSWORD as a pair.

    Raises:
        RequestError: no colon, or nothing on a side of it.
    """
    name, _, password = text.partition(":")
    if not name or not password:
        raise RequestError("--auth must be NAME:PASSWORD.")
    return name, password
