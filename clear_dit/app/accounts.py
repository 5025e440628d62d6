"""Accounts: names and passwords, who is logged in, and attempts that are slowed down."""

from __future__ import annotations

import hashlib
import hmac
import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import whole_file
from .caller import new_secret

# A login ends after so many seconds; an account has as many at once.
KEEP_SECONDS = 30 * 86400
MAX_LOGINS = 50
# Of wrong attempts: seconds to wait after the first, doubled by each, up to the last; by address,
# and by name, where somebody else's attempts must not keep out who knows the password.
FIRST_WAIT = 0.5
MAX_WAIT = {"address": 60.0, "name": 2.0}
# Wrong attempts are forgotten so many seconds after the last.
_FORGET = 900.0
_MAX_REMEMBERED = 10_000


class TooSoon(Exception):  # noqa: N818 - nothing is wrong yet
    """After wrong attempts the next has to wait; `seconds` so long."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"Wait {max(1, round(seconds))} s before the next attempt.")
        self.seconds = seconds


class Accounts:
    """Those of one server. Logins outlast a restart, and end with a change of the password.

    The disk holds a login's SHA-256, and of the password only an HMAC whose key it does not hold.

    Args:
        auth: pairs of name and password.
        path: the file for logins.
    """

    def __init__(self, auth: Sequence[tuple[str, str]], path: Path) -> None:
        self._passwords, self._path = dict(auth), path
        self._lock = threading.Lock()
        self._logins: dict[str, dict[str, Any]] = _read(path)
        # By what is slowed: wrong attempts so far, and until when.
        self._wrong: dict[tuple[str, str], tuple[int, float]] = {}

    def __bool__(self) -> bool:
        return bool(self._passwords)

    def log_in(self, name: str, password: str, address: str) -> str | None:
        """The secret for a cookie; None if name or password are wrong.

        Raises:
            TooSoon: after wrong attempts, without a look at the password.
            OSError: the login cannot be written.
        """
        keys = [("address", address), ("name", name)]
        with self._lock:
            now = time.monotonic()
            wait = max(self._wrong.get(key, (0, now))[1] for key in keys) - now
            if wait > 0:
                raise TooSoon(wait)
            known = self._passwords.get(name, "")
            same = hmac.compare_digest(known.encode(), password.encode())
            if not (same and known):
                for key in keys:
                    self._slow_down(key, now)
                return None
            for key in keys:
                self._wrong.pop(key, None)
            secret = new_secret()
            until = time.time() + KEEP_SECONDS
            login = {"account": name, "password": _proof(secret, known), "until": until}
            mine = [digest for digest, one in self._logins.items() if one["account"] == name]
            for digest in mine[: max(0, len(mine) - MAX_LOGINS + 1)]:
                del self._logins[digest]
            self._logins[_digest(secret)] = login
            self._write()
            return secret

    def account(self, secret: str) -> str | None:
        """Who logged in with this secret; None if nobody did, or it ended."""
        with self._lock:
            login = self._logins.get(_digest(secret))
            if login is None or login["until"] < time.time():
                return None
            known = self._passwords.get(login["account"])
            same = known and hmac.compare_digest(login["password"], _proof(secret, known))
            return str(login["account"]) if same else None

    def log_out(self, secret: str) -> None:
        """End a login.

        Raises:
            OSError: it cannot be written; it has ended for this process.
        """
        with self._lock:
            if self._logins.pop(_digest(secret), None):
                self._write()

    def _slow_down(self, key: tuple[str, str], now: float) -> None:
        times, until = self._wrong.pop(key, (0, now))
        times = 1 if until + _FORGET < now else times + 1
        while len(self._wrong) >= _MAX_REMEMBERED:
            del self._wrong[next(iter(self._wrong))]
        wait = min(FIRST_WAIT * 2.0 ** min(times - 1, 30), MAX_WAIT[key[0]])
        self._wrong[key] = times, now + wait

    def _write(self) -> None:
        now = time.time()
        self._logins = {one: login for one, login in self._logins.items() if login["until"] > now}
        with whole_file(self._path) as file:
            file.write(json.dumps(self._logins).encode())


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _proof(secret: str, password: str) -> str:
    return hmac.new(secret.encode(), password.encode(), hashlib.sha256).hexdigest()


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads(path.read_bytes())
        return {
            digest: {"account": one["account"], "password": one["password"], "until": one["until"]}
            for digest, one in found.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
