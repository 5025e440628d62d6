"""Who sends a request: told by the guard, carried in the request's scope."""

from __future__ import annotations

import hashlib
import ipaddress
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

SECRET = re.compile(r"[A-Za-z0-9_-]{43}")
_KEY = "clear_dit.caller"


@dataclass(frozen=True)
class Caller:
    """Who asks.

    Attributes:
        owner: the name of their folder: of the account, or of who knows a cookie's secret.
        party: whose turns and limits they share: the account, the key, or all visitors of one
            address; its first word says which.
        account: who logged in; None where there are no accounts.
    """

    owner: str
    party: str
    account: str | None = None


def visitor_at(secret: str, address: str) -> Caller:
    """Who knows a cookie's secret."""
    return Caller(visitor_of(secret), f"address {address}")


def account_holder(account: str) -> Caller:
    """Who logged in; images are those of the account, from whatever browser."""
    digest = hashlib.sha256(f"account {account}".encode()).hexdigest()
    return Caller(digest, f"account {account}", account)


def key_holder(digest: str) -> Caller:
    """Who has a key, by its SHA-256 in hex."""
    owner = hashlib.sha256(f"key {digest}".encode()).hexdigest()
    return Caller(owner, f"key {owner[:16]}")


def for_one_request(caller: Caller) -> Caller:
    """The same with a folder of its own: its images are answered and gone, and in no history."""
    return Caller(visitor_of(new_secret()), caller.party)


def new_secret() -> str:
    """For a new visitor, or a login: 256 random bits."""
    return secrets.token_urlsafe(32)


def visitor_of(secret: str) -> str:
    """The name of the folder of who knows this secret."""
    return hashlib.sha256(secret.encode()).hexdigest()


def address_of(scope: Any) -> str:
    """Where a request comes from: an IPv4 address, or the 64 bits of IPv6 that a household has."""
    host = (scope.get("client") or ("unknown", 0))[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return str(host)
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


def cookies(headers: Iterable[tuple[bytes, bytes]], name: str) -> list[str]:
    """The cookies of a name that could be a secret; what else browsers send is not looked at.

    Other programs on the same machine set cookies for all ports, of which many are none by RFC
    6265, and some could have this name.
    """
    found = []
    for header, value in headers:
        if header == b"cookie":
            for pair in value.decode("latin-1").split(";"):
                its_name, _, secret = pair.strip().partition("=")
                if its_name == name and SECRET.fullmatch(secret):
                    found.append(secret)
    return found


def remember(scope: dict[str, Any], caller: Caller) -> dict[str, Any]:
    """A scope that tells who asks."""
    return scope | {_KEY: caller}


def who_asks(request: Any) -> Caller:
    """Who sent a request (Starlette's, or Gradio's around it) that passed the guard."""
    caller = getattr(request, "request", request).scope[_KEY]
    assert isinstance(caller, Caller)
    return caller
