"""A multipart form with an image, taken in within bounds."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fastapi import Request
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from ...errors import RequestError
from ..reception import paced
from ..routes import BodyError
from ..settings import MAX_BODY_BYTES
from .errors import ParamError

_BLOCK = 2**20
_MAX_FIELDS = 40
# By these names the official client sends an image, or a list of them.
_IMAGE = ("image", "image[]")


@dataclass(frozen=True)
class Form:
    """What was sent.

    Attributes:
        fields: texts by name.
        image: the file, on the disk where it is large; read once.
        name: what it is called.
    """

    fields: dict[str, str]
    image: UploadFile
    name: str

    async def blocks(self) -> AsyncIterator[bytes]:
        """The image's bytes."""
        while block := await self.image.read(_BLOCK):
            yield block


@asynccontextmanager
async def read_form(request: Request) -> AsyncIterator[Form]:
    """The form that a request's body is; its files are gone afterwards.

    Raises:
        RequestError: it is none, is too large or slow, or has not one image.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise ParamError("The request must be multipart/form-data.", status=415)
    data = await _parsed(request)
    try:
        yield _form(data)
    finally:
        await data.close()


async def _parsed(request: Request) -> FormData:
    """The parts of a form.

    Raises:
        RequestError: see `read_form`.
    """

    async def blocks() -> AsyncGenerator[bytes, None]:
        # The parser removes what it has written after its own kind of error only.
        try:
            async for block in paced(request.stream(), MAX_BODY_BYTES):
                yield block
        except RequestError as error:
            raise MultiPartException(str(error)) from error
        except ClientDisconnect as error:
            raise MultiPartException("The request was cut off.") from error

    parser = MultiPartParser(
        request.headers,
        blocks(),
        max_files=2,
        max_fields=_MAX_FIELDS,
        max_part_size=MAX_BODY_BYTES,
    )
    try:
        return await parser.parse()
    except MultiPartException as error:
        if isinstance(error.__cause__, RequestError):
            raise error.__cause__ from error
        raise BodyError(f"The form cannot be read: {error.message}") from error
    except (KeyError, ValueError, AssertionError) as error:  # a header that is bent
        raise BodyError("The form cannot be read.") from error


def _form(data: FormData) -> Form:
    fields: dict[str, str] = {}
    images: list[UploadFile] = []
    for name, value in data.multi_items():
        _check_text(name, value.filename or "" if isinstance(value, UploadFile) else value)
        if isinstance(value, UploadFile):
            if name == "mask":
                raise ParamError(
                    "mask: this server repaints whole images only; leave it out.", "mask"
                )
            if name not in _IMAGE:
                raise ParamError(f"There is no file {name[:40]!r}; there is image.", name[:40])
            images.append(value)
        elif name in fields:
            raise ParamError(f"{name[:40]}: given twice.", name[:40])
        else:
            fields[name] = value
    if len(images) != 1:
        raise ParamError(f"image: send one file, got {len(images)}.", "image")
    return Form(fields, images[0], images[0].filename or "image")


def _check_text(*texts: str) -> None:
    """Refuse halves of characters, which some charsets can say and no answer can.

    Raises:
        BodyError: there are some.
    """
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise BodyError("The form's texts must be UTF-8.") from error
