"""In front of every request: who asks, from which page, and what a browser may do with answers."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlsplit

from .accounts import Accounts
from .caller import (
    Caller,
    account_holder,
    address_of,
    cookies,
    new_secret,
    remember,
    visitor_at,
)
from .keys import Keys
from .openai.errors import FOR_PROGRAMS, error_at
from .openai.links import PREFIX as FILES
from .settings import Settings

logger: logging.Logger = logging.getLogger(__name__)

MAX_AGE = 365 * 86400
LOGIN = "/login"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "font-src 'self'; connect-src 'self'; frame-src 'self'; frame-ancestors 'self'; "
    "base-uri 'none'; form-action 'self'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "same-origin",
    "x-content-type-options": "nosniff",
}
_READS = ("GET", "HEAD", "OPTIONS")
_ASK_FOR_KEY = "Send a key of this server: Authorization: Bearer KEY."
_NO_KEYS = "Log in; for programs the server needs a key of its own: --api-key."
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Guard:
    """ASGI middleware.

    A browser's request from another site, or by a name that is none of a local server's, is
    refused, unless it has a key or its URL is the secret. Where there are accounts or keys, every
    route asks for one, but the login and files whose URL is the secret; else who comes without a
    visitor's cookie gets one, and has it at once.
    `who_asks` tells the routes.

    Args:
        app: what is guarded.
        settings: of the server.
        accounts: of the server.
    """

    def __init__(self, app: Any, settings: Settings, accounts: Accounts) -> None:
        self._app, self._accounts, self._keys = app, accounts, Keys(settings.keys)
        self._cookie = settings.cookie
        # Behind a proxy the name is the proxy's matter.
        self._local_names_only = settings.local and not settings.proxy

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # nothing here has any
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(send, scope["path"])
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        authorization = headers.get(b"authorization")
        keyed = bool(self._keys) and (authorization or "").lower().startswith("bearer")
        holder = self._keys.caller(authorization or "") if keyed else None
        # No other site knows a key, or the secret of a URL.
        if holder is None and not _is_secret(scope):
            refused = self._refused(scope["method"], headers)
            if refused is not None:
                await answer.error(403, refused)
                return
        secrets = cookies(scope["headers"], self._cookie)
        if self._accounts or self._keys:
            # Who sends a wrong key is not let in by a cookie.
            caller = holder if keyed else self._logged_in(secrets)
            if caller is not None:
                scope = remember(scope, caller)
            elif not self._open(scope):
                await self._ask_for_login(scope, headers, answer)
                return
        else:
            if not secrets:
                secrets = [new_secret()]
                secure = scope["scheme"] == "https"
                if not answer.for_programs:
                    answer.headers["set-cookie"] = set_cookie(self._cookie, secrets[0], secure)
            scope = remember(scope, visitor_at(secrets[0], address_of(scope)))
        try:
            await self._app(scope, receive, answer.send)
        except Exception:
            logger.exception("%s %s", scope["method"], quote(scope["path"])[:200])
            if not answer.started:
                await answer.error(500, "Something went wrong on the server.")

    def _logged_in(self, secrets: list[str]) -> Caller | None:
        found = (self._accounts.account(secret) for secret in secrets)
        account = next((one for one in found if one is not None), None)
        return None if account is None else account_holder(account)

    def _open(self, scope: Any) -> bool:
        """Whether a route asks for no login: the login itself, and secret URLs."""
        if scope["path"] == LOGIN:
            return bool(self._accounts)
        return _is_secret(scope)

    def _refused(self, method: str, headers: Mapping[bytes, str]) -> str | None:
        """Why a request is refused by where it comes from; None if it is not.

        Who is no browser sends none of these headers but Host, and can tell what it likes.
        """
        host = headers.get(b"host", "")
        if self._local_names_only and _name(host) not in _LOOPBACK:
            return "This server is for this machine: open it as localhost."
        site, origin = headers.get(b"sec-fetch-site"), headers.get(b"origin")
        navigates = method in _READS and headers.get(b"sec-fetch-mode") == "navigate"
        if site is not None:
            same = site in ("same-origin", "none") or navigates
        else:
            same = origin is None or origin in (f"http://{host}", f"https://{host}")
        return None if same else "Another site may not ask this server for anything."

    async def _ask_for_login(
        self, scope: Any, headers: Mapping[bytes, str], answer: _Answer
    ) -> None:
        if answer.for_programs or not self._accounts:
            answer.headers["www-authenticate"] = "Bearer"
            await answer.error(401, _ASK_FOR_KEY if self._keys else _NO_KEYS)
        elif scope["method"] == "GET" and "text/html" in headers.get(b"accept", ""):
            answer.headers["location"] = scope.get("root_path", "") + LOGIN
            await answer.error(303, "Log in.")
        else:
            await answer.error(401, "Log in.")


class _Answer:
    """The way of an answer, with what stands in the header of every one."""

    def __init__(self, send: Any, path: str) -> None:
        self._send, self._path, self.started = send, path, False
        self.for_programs = path.startswith(FOR_PROGRAMS)
        self.headers = dict(HEADERS)

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            kept = [
                (name, value)
                for name, value in message.get("headers", [])
                # Gradio's: nobody else may read answers.
                if not name.lower().startswith(b"access-control-")
            ]
            there = {name.lower() for name, _ in kept}
            kept += [
                (name.encode(), value.encode("latin-1"))
                for name, value in self.headers.items()
                if name.encode() not in there
            ]
            message = message | {"headers": kept}
        await self._send(message)

    async def error(self, status: int, words: str) -> None:
        """A refusal, as the routes there tell it."""
        body = json.dumps(error_at(self._path, status, words)).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"cache-control", b"no-store"),
        ]
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})


def _is_secret(scope: Any) -> bool:
    """Whether a request is for a file whose URL is the secret."""
    return scope["method"] == "GET" and str(scope["path"]).startswith(FILES)


def set_cookie(name: str, secret: str, secure: bool, seconds: int = MAX_AGE) -> str:
    """The header that gives a browser a cookie; 0 seconds take it away."""
    text = f"{name}={secret}; Path=/; Max-Age={seconds}; HttpOnly; SameSite=Lax"
    return f"{text}; Secure" if secure else text


def _name(host: str) -> str:
    """Of a Host header, without the port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
