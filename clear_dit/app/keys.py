"""The keys of programs: who sends one as `Authorization: Bearer KEY` may come in."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from ..errors import RequestError
from .caller import Caller, key_holder

MIN_LENGTH = 16


class Keys:
    """Those of one server.

    Args:
        keys: as they were given; checked by `check_keys`.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def caller(self, authorization: str) -> Caller | None:
        """Who sends this header; None if it holds none of the keys.

        All keys are compared, each in constant time, whatever was sent.
        """
        scheme, _, sent = authorization.partition(" ")
        digest, found = _digest(sent.strip()), None
        for known in self._digests:
            if hmac.compare_digest(known, digest):
                found = known
        if found is None or scheme.lower() != "bearer":
            return None
        return key_holder(found.hex())


def check_keys(keys: tuple[str, ...]) -> None:
    """Refuse keys that cannot be sent, or could be guessed.

    Raises:
        RequestError: which rule.
    """
    for key in keys:
        if len(key) < MIN_LENGTH:
            raise RequestError(
                f"--api-key: a key has at least {MIN_LENGTH} characters, and one has {len(key)}; "
                "make one with: openssl rand -hex 32"
            )
        if not key.isascii() or not key.isprintable() or " " in key:
            raise RequestError("--api-key: a key has ASCII letters, digits and signs, no spaces.")
    if len(set(keys)) < len(keys):
        raise RequestError("--api-key: every key once.")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
