"""The commands that serve: what they set where the user says nothing."""

import os
import time

from support.command_line import run

from clear_dit.app import server
from clear_dit.app.settings import MAX_IMAGES
from clear_dit.app.store import RECORD, Store, new_name


def test_the_first_image_of_a_slow_request_waits_for_the_last(tmp_path, monkeypatch):
    """Each of them may take hours; and a URL holds for an hour after the answer."""
    started = []
    monkeypatch.setattr(server, "serve", started.append)
    assert run("serve", "--out", tmp_path) == 0
    store, job = Store(tmp_path), new_name()
    folder = store.new_folder("a" * 64, job)
    store.write("a" * 64, {"id": job, "state": "done", "created": 0, "images": [], "entry": {}})
    then = time.time() - MAX_IMAGES * 2 * 3600
    os.utime(folder / RECORD, (then, then))
    assert store.remove_older(started[0].keep_days) == 0
    assert folder.is_dir()
