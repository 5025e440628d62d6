"""Callers, entries and actions of the page's server in this process."""

import time

from clear_dit.app.actions import Actions
from clear_dit.app.caller import new_secret, visitor_at
from clear_dit.app.jobs import Jobs
from clear_dit.app.settings import Settings
from clear_dit.app.store import ENDED, Store

SMALL = {"prompt": "a house", "width": 256, "height": 256, "steps": 3}


def visitors(count, address=None):
    """Callers: each from an address of its own, or all from one."""
    addresses = [address or f"10.0.0.{number}" for number in range(count)]
    return [visitor_at(new_secret(), one) for one in addresses]


def make_actions(folder, make_runner, **settings):
    """Those of a server with the demo pipeline; not started."""
    made = Settings(**({"models": ("demo",), "out": folder, "device": "cpu"} | settings))
    store = Store(folder)
    return Actions(made, store, Jobs(made, store, make_runner))


def ended(actions, caller, job, seconds=120):
    """The status of a job that has come to its end."""
    end = time.monotonic() + seconds
    while (found := actions.status(job, caller))["state"] not in ENDED:
        assert time.monotonic() < end, found
        time.sleep(0.01)
    return found
