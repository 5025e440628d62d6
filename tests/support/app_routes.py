"""The page's application in this process, and all routes it has."""

import asyncio
import re
from concurrent.futures import ThreadPoolExecutor

import httpx

from clear_dit.app.application import make_application
from clear_dit.app.jobs import Jobs
from clear_dit.app.settings import Settings
from clear_dit.app.store import Store

BASE = "http://127.0.0.1:7860"


def run(coroutine):
    """What a coroutine returns, on a thread of its own: playwright has a loop in this one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


def make_app(folder, **settings):
    """An application whose jobs wait for ever: no model is loaded."""
    made = Settings(**({"models": ("demo",), "out": folder, "device": "cpu"} | settings))
    store = Store(folder)

    async def make():  # in a loop, as Gradio makes one of its own otherwise
        return make_application(made, store, Jobs(made, store))

    return run(make())


def connect(app, address="127.0.0.1", **options):
    """A client from an address, which keeps cookies."""
    transport = httpx.ASGITransport(app, client=(address, 5000))
    return httpx.AsyncClient(transport=transport, base_url=BASE, **options)


def all_routes(app):
    """(method, path) of every route below an application, its parameters filled."""
    found, seen = set(), set()

    def walk(node, prefix):
        if id(node) in seen:
            return
        seen.add(id(node))
        inner = [getattr(node, name, None) for name in ("_app", "app", "engine", "original_router")]
        routes = getattr(node, "routes", None) or []
        path = getattr(node, "path", None)
        if path is not None and getattr(node, "methods", None):
            for method in node.methods:
                found.add((method, re.sub(r"\{[^}]*\}", "x", prefix + path) or "/"))
            return
        for child in [*routes, *(one for one in inner if one is not None)]:
            walk(child, prefix + (path or "").removesuffix("/"))

    walk(app, "")
    return sorted(found)
