"""Refusals as OpenAI's API tells them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel

from ...errors import RequestError
from ..entry import EntryError
from ..jobs import LimitError
from ..routes import BodyError, status_and_headers

# Routes of programs, which keep no cookies.
FOR_PROGRAMS = ("/v1/", "/health", "/metrics")
# Fields of an entry that a request of this API calls by another name.
_PARAMS = {"width": "size", "height": "size"}


class ErrorDetail(BaseModel):
    """What was wrong.

    Attributes:
        message: which rule, and what to do.
        type: invalid_request_error, authentication_error, rate_limit_error or server_error.
        param: the parameter at fault, if it is one.
        code: a name for programs, if there is one.
    """

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """The body of every refusal."""

    error: ErrorDetail


class ParamError(BodyError):
    """A parameter of a request is at fault.

    Args:
        words: for who asked.
        param: the parameter, if it is one.
        status: of the answer.
        code: a name for programs.
    """

    def __init__(
        self, words: str, param: str | None = None, status: int = 400, code: str | None = None
    ) -> None:
        super().__init__(words, status)
        self.param = param
        self.code = code


class FailedError(Exception):
    """An accepted image could not be made; `status` 500, or 503 where the server is stopping."""

    def __init__(self, words: str, status: int = 500) -> None:
        super().__init__(words)
        self.status = status


def error_body(
    status: int, words: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The JSON of a refusal."""
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    detail = ErrorDetail(message=words, type=kind, param=param, code=code)
    return {"error": detail.model_dump()}


def error_at(path: str, status: int, words: str) -> dict[str, Any]:
    """The JSON of a refusal as all routes near a path tell it."""
    if path.startswith(FOR_PROGRAMS):
        return error_body(status, words)
    return {"error": words, "field": None}


def broken(request: Any, error: Exception) -> JSONResponse:
    """The answer where the server is at fault; the guard writes down why."""
    words = "Something went wrong on the server."
    return JSONResponse(error_at(request.scope["path"], 500, words), 500)


def refused(error: RequestError | FailedError) -> JSONResponse:
    """The answer to a request that is refused, or whose image failed."""
    if isinstance(error, FailedError):
        # The official client would order the same images again.
        headers = {"cache-control": "no-store", "x-should-retry": str(error.status == 503).lower()}
        return JSONResponse(error_body(error.status, str(error)), error.status, headers)
    status, headers = status_and_headers(error)
    param, code = None, None
    if isinstance(error, ParamError):
        param, code = error.param, error.code
    elif isinstance(error, EntryError):
        param = _PARAMS.get(error.field or "", error.field)
    elif isinstance(error, LimitError):
        code = "rate_limit_exceeded"
    return JSONResponse(error_body(status, str(error), param, code), status, headers)
