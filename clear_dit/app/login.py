"""The page that asks who comes, for a browser with or without scripts, and for programs."""

from __future__ import annotations

import base64
import hashlib
import logging
from html import escape
from string import Template
from typing import Any
from urllib.parse import parse_qsl

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from .accounts import KEEP_SECONDS, Accounts, TooSoon
from .caller import address_of, cookies
from .files import STATIC
from .guard import LOGIN, POLICY, set_cookie
from .routes import BodyError, read_body, refusal, told
from .settings import Settings

logger: logging.Logger = logging.getLogger(__name__)

_MAX_LENGTH = 200


def make_login(settings: Settings, accounts: Accounts) -> APIRouter:
    """The routes: GET login, the page; POST login, a form of username and password; POST logout.

    A program gets JSON from the second, a browser is led to the page.
    """
    router = APIRouter()
    style = (STATIC / "login.css").read_text()
    page = Template((STATIC / "login.html").read_text())
    # The page has its style inside, as nothing else is served before the login.
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = POLICY.replace("style-src 'self'", f"style-src 'sha256-{digest}'")

    def shown(problem: str = "", status: int = 200) -> Response:
        html = page.substitute(style=style, problem=escape(problem))
        return HTMLResponse(html, status, {"content-security-policy": policy} | _FRESH)

    @router.get(LOGIN)
    def login_page() -> Response:
        return shown() if accounts else RedirectResponse(".", 303)

    @router.post(LOGIN)
    async def log_in(request: Request) -> Response:
        by_browser = "text/html" in request.headers.get("accept", "")
        try:
            name, password = _form(await read_body(request.receive, 4096))
        except BodyError as error:
            return refusal(error)
        address = address_of(request.scope)
        try:
            secret = await run_in_threadpool(accounts.log_in, name, password, address)
        except TooSoon as error:
            wait = {"retry-after": str(round(error.seconds) + 1)}
            answer = shown(str(error), 429) if by_browser else told(_error(str(error)), 429)
            answer.headers.update(wait)
            return answer
        if secret is None:
            logger.warning("a wrong login from %s", address)
            words = "Name or password are wrong."
            return shown(words, 401) if by_browser else told(_error(words), 401)
        answer = RedirectResponse(".", 303) if by_browser else told({"success": True})
        return _with_cookie(answer, settings, request, secret, KEEP_SECONDS)

    @router.post("/logout")
    async def log_out(request: Request) -> Response:
        for secret in cookies(request.headers.raw, settings.cookie):
            await run_in_threadpool(accounts.log_out, secret)
        # Images may be kept by the browser.
        answer = RedirectResponse("login", 303, {"clear-site-data": '"cache"'})
        return _with_cookie(answer, settings, request, "", 0)

    return router


_FRESH = {"cache-control": "no-store"}


def _with_cookie(
    answer: Response, settings: Settings, request: Request, secret: str, seconds: int
) -> Response:
    secure = request.url.scheme == "https"
    answer.headers["set-cookie"] = set_cookie(settings.cookie, secret, secure, seconds)
    return answer


def _form(body: bytes) -> tuple[str, str]:
    """Name and password of a form.

    Raises:
        BodyError: it is none, or they are too long to be any.
    """
    try:
        pairs: dict[str, Any] = dict(parse_qsl(body.decode(), max_num_fields=10))
    except ValueError as error:
        raise BodyError("A login must be a form of username and password.") from error
    name, password = pairs.get("username", ""), pairs.get("password", "")
    if max(len(name), len(password)) > _MAX_LENGTH:
        raise BodyError("Name and password are too long.")
    return name, password


def _error(words: str) -> dict[str, Any]:
    return {"error": words, "field": None}
