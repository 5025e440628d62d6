"""In front of every request: who the visitor is, what is closed, what a browser may load."""

from __future__ import annotations

import re
from http.cookies import CookieError, SimpleCookie
from typing import Any

from .store import SECRET, new_secret, visitor_of

COOKIE = "clear-dit-visitor"
MAX_AGE = 365 * 86400
# Of Gradio's routes those that read or write files, fetch from other servers or keep records:
# nothing here needs them.
CLOSED = re.compile(
    r"/+(gradio_api/+)?(file|proxy|stream|upload|upload_progress|run-history|custom_component|"
    r"deep_link|runs|monitoring|vibe[^/]*)([=/].*)?"
)
# Gradio's page has inline scripts, and templates that are compiled in the browser.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self'; frame-src 'self'; frame-ancestors 'self'; object-src 'none'; "
    "base-uri 'self'; form-action 'self'"
)
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
)


class Guard:
    """ASGI middleware. Who comes without a visitor's cookie gets one, and has it at once.

    Args:
        app: what is guarded.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                return  # Gradio's page uses none
            await self._app(scope, receive, send)
            return
        if CLOSED.fullmatch(scope["path"]):
            await send({"type": "http.response.start", "status": 404, "headers": [*HEADERS]})
            await send({"type": "http.response.body", "body": b"Not found"})
            return
        headers = list(scope["headers"])
        more = [*HEADERS]
        if _secret(_cookies(headers)) is None:
            secret = new_secret()
            others = [
                value
                for name, value in headers
                if name == b"cookie" and COOKIE.encode() not in value
            ]
            headers = [pair for pair in headers if pair[0] != b"cookie"]
            headers.append((b"cookie", b"; ".join([*others, f"{COOKIE}={secret}".encode()])))
            secure = "; Secure" if scope["scheme"] == "https" else ""
            cookie = f"{COOKIE}={secret}; Path=/; Max-Age={MAX_AGE}; HttpOnly; SameSite=Lax"
            more.append((b"set-cookie", (cookie + secure).encode()))

        async def send_more(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = message | {"headers": [*message.get("headers", []), *more]}
            await send(message)

        await self._app(scope | {"headers": headers}, receive, send_more)


def visitor(cookies: Any) -> str:
    """The name of the folder of who sent these cookies; they have passed the guard."""
    secret = _secret(cookies)
    assert secret is not None
    return visitor_of(secret)


def _secret(cookies: Any) -> str | None:
    secret = cookies.get(COOKIE)
    return secret if secret and SECRET.fullmatch(secret) else None


def _cookies(headers: list[tuple[bytes, bytes]]) -> dict[str, str]:
    text = "; ".join(value.decode("latin-1") for name, value in headers if name == b"cookie")
    try:
        return {name: morsel.value for name, morsel in SimpleCookie(text).items()}
    except CookieError:
        return {}
