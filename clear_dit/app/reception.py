"""Taking uploads in: who may, how many at once, and one decoded at a time."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections import Counter
from collections.abc import AsyncIterable, AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastapi.concurrency import run_in_threadpool

from ..generation.image_input import open_image
from ..generation.image_output import read_settings
from ..malloc import give_back_freed_memory
from .caller import Caller
from .downloads import converted
from .entry import FIELDS
from .jobs import LimitError
from .routes import BodyError
from .settings import (
    MAX_BODY_BYTES,
    MAX_PROMPT,
    MAX_UPLOAD_BYTES,
    MAX_UPLOADING,
    MAX_UPLOADING_IN_ALL,
    MAX_UPLOADS_OF_ADDRESS,
    Settings,
)
from .store import Store
from .uploads import FORMATS, check_upload, keep_upload

# How an entry says that a setting is not there.
_NONE: dict[str, Any] = {"negative_prompt": "", "lora": "", "far": None, "strength": None}
# How slowly an upload may come: seconds, and bytes a second after them.
_PATIENCE = 10.0
_LEAST_RATE = 2**17


class Reception:
    """Takes images in for one server.

    Args:
        settings, store: of the server.
    """

    def __init__(self, settings: Settings, store: Store) -> None:
        self._settings, self._store = settings, store
        self._lock = threading.Lock()
        self._present: Counter[str] = Counter()
        # Kept ones and whose they are, the oldest first.
        self._parties: dict[Path, str] = {}
        self._one_at_a_time = threading.Lock()
        self._conversions = asyncio.Lock()

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Held while a whole image is decoded, which is large: one at a time, whoever asks."""
        with self._one_at_a_time:
            try:
                yield
            finally:
                give_back_freed_memory()

    async def receive(self, stream: Any, length: int | None, caller: Caller) -> dict[str, Any]:
        """Keep the image that a request's body is.

        Args:
            stream: of its blocks of bytes.
            length: that its header tells.
            caller: whose it becomes.

        Returns:
            name, width, height (pixels), settings (see `settings_of`).

        Raises:
            RequestError: it is refused; nothing is left.
            OSError: the disk is full; nothing is left.
        """
        if length is not None and length > MAX_UPLOAD_BYTES:
            raise _too_large()
        with self.place(caller):
            return await self.keep(paced(stream), caller)

    async def keep(self, blocks: AsyncIterator[bytes], caller: Caller) -> dict[str, Any]:
        """What `receive` does, for who has a place and bounds what comes."""
        path = await run_in_threadpool(self._new, caller)
        try:
            with path.open("wb") as file:
                async for block in blocks:
                    file.write(block)
            return await run_in_threadpool(self._keep, path)
        except BaseException:
            self._store.forget(path)
            raise

    async def convert(self, path: Path, kind: str) -> Path:
        """See `converted`; who waits for it holds none of the threads that answer others."""
        async with self._conversions:
            return await run_in_threadpool(converted, path, kind, self.decoding)

    def copy(self, source: Path, caller: Caller) -> dict[str, Any]:
        """Keep an image that is there already as an upload of its owner, see `receive`.

        Raises:
            RequestError: it is refused, or gone.
            OSError: the disk is full.
        """
        with self.place(caller):
            path = self._new(caller)
            try:
                shutil.copyfile(source, path)
                return self._keep(path)
            except BaseException:
                self._store.forget(path)
                raise

    def _new(self, caller: Caller) -> Path:
        """See `Store.new_upload`; a party's oldest go, as who sends no cookie has many owners."""
        path = self._store.new_upload(caller.owner)
        with self._lock:
            self._parties = {one: who for one, who in self._parties.items() if one.exists()}
            self._parties[path] = caller.party
            theirs = [one for one, who in self._parties.items() if who == caller.party]
        for old in theirs[: max(0, len(theirs) - MAX_UPLOADS_OF_ADDRESS)]:
            self._store.forget(old)
        return path

    def _keep(self, path: Path) -> dict[str, Any]:
        with self.decoding():
            check_upload(path)
            settings = settings_of(path, self._settings)
            width, height = keep_upload(path)
        return {"name": path.name, "width": width, "height": height, "settings": settings}

    @contextmanager
    def place(self, caller: Caller) -> Iterator[None]:
        """Held while an image comes in.

        Raises:
            LimitError: enough come, of this party or of all.
        """
        with self._lock:
            if self._present[caller.party] >= MAX_UPLOADING:
                raise LimitError("Other images of yours are still being sent; wait for them.")
            if self._present.total() >= MAX_UPLOADING_IN_ALL:
                raise LimitError("Others are sending images now; try again in a minute.")
            self._present[caller.party] += 1
        try:
            yield
        finally:
            with self._lock:
                self._present[caller.party] -= 1
                self._present += Counter()  # without those that are gone


def settings_of(path: Path, server: Settings) -> dict[str, Any] | None:
    """The fields of an entry that stand in an image which this program made; None in others.

    They are checked where they are used, here only by their kind and length.
    """
    try:
        with open_image(path, "The file", FORMATS):
            found = read_settings(path, MAX_BODY_BYTES)
            # NaN, and halves of characters, are no JSON of ours: they cannot be answered.
            json.dumps(found, ensure_ascii=False, allow_nan=False).encode()
    except Exception:  # what others wrote there
        return None
    if not isinstance(found, dict):
        return None
    entry: dict[str, Any] = {}
    for name in set(FIELDS) - {"image"}:
        value = found.get(name)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if isinstance(value, str) and len(value) > MAX_PROMPT:
            continue
        if isinstance(value, (str, int, float, bool)):
            entry[name] = value
        elif value is None and name in found and name in _NONE:
            entry[name] = _NONE[name]
    if not isinstance(entry.get("prompt"), str):
        return None
    if entry.get("model") not in server.models:
        entry.pop("model", None)
    if isinstance(entry.get("lora"), str):
        entry["lora"] = Path(entry["lora"]).stem  # as visitors know it
    return entry


async def paced(stream: AsyncIterable[bytes], more: int = 0) -> AsyncIterator[bytes]:
    """The blocks of an upload, as long as it comes fast enough and is not too large.

    Args:
        stream: of blocks.
        more: bytes that it may have besides an image's.

    Raises:
        RequestError: it is refused.
    """
    size, latest = 0, asyncio.get_running_loop().time() + _PATIENCE
    blocks = aiter(stream)
    while True:
        try:
            async with asyncio.timeout_at(latest + size / _LEAST_RATE):
                block = await anext(blocks)
        except StopAsyncIteration:
            return
        except TimeoutError as error:
            raise BodyError("The image came too slowly; send it again.", 408) from error
        size += len(block)
        if size > MAX_UPLOAD_BYTES + more:
            raise _too_large()
        yield block


def _too_large() -> BodyError:
    return BodyError(
        f"The image has more than {MAX_UPLOAD_BYTES // 2**20} MiB; take a smaller one.", 413
    )
