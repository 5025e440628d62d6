"""Eight visitors at once: everybody gets the image they asked for, and nothing is left behind."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest
from PIL import Image
from support.slow import slow
from support.threads import pixels_of

from clear_dit.app import store as store_module
from clear_dit.app.jobs import Jobs
from clear_dit.app.request import Entry, make_requests
from clear_dit.app.settings import Settings
from clear_dit.app.store import ENDED, MAX_UPLOADS, Store, new_secret, visitor_of
from clear_dit.errors import RequestError
from clear_dit.generation.runner import PipelineRunner

VISITORS, IMAGES = 8, 3  # of each
SIZES = [(64, 64), (64, 96), (96, 64), (80, 48)]


@pytest.fixture(scope="module")
def runner():
    return PipelineRunner("demo", "float32", "cpu")


@pytest.fixture
def jobs(tmp_path, runner):
    settings = Settings(models=("demo",), out=tmp_path, queue_size=32, device="cpu")
    jobs = Jobs(settings, Store(tmp_path), lambda *wanted: runner)
    jobs.start("demo", "float32", "cpu")
    yield jobs
    jobs.stop()


def make_entry(number):
    height, width = SIZES[number % len(SIZES)]
    attention = ("clear", "full", "both")[number % 3]
    prompt = f"a house, number {number}"
    return Entry(prompt, width, height, attention, 4, 1, None, 2, 2.0, number, "demo")


def wait_for(jobs, visitor, name):
    end = time.monotonic() + 120
    while (found := jobs.status(visitor, name))["state"] not in ENDED:
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


@slow
def test_everybody_gets_their_own_images(jobs, runner, tmp_path):
    store, settings = jobs._store, jobs._settings
    ready = threading.Barrier(VISITORS)

    def visit(number):
        who, found = visitor_of(new_secret()), []
        ready.wait(30)
        for image in range(IMAGES):
            entry = make_entry(number + VISITORS * image)
            name = jobs.submit(who, make_requests(entry, settings)).id
            assert wait_for(jobs, who, name)["state"] == "done"
            found.append((entry, store.folder(who, name)))
        assert [one["prompt"] for one in store.history(who)[::-1]] == [e.prompt for e, _ in found]
        return found

    with ThreadPoolExecutor(VISITORS) as pool:
        visits = [future.result(300) for future in [pool.submit(visit, n) for n in range(VISITORS)]]
    for entry, folder in (one for visit in visits for one in visit):
        requests = make_requests(entry, settings)
        assert len(list(folder.glob("*.png"))) == len(requests)
        for request in requests:
            runner.generate(request, tmp_path / "alone.png")
            made = pixels_of(folder / f"{request.attention}.png")
            assert made == pixels_of(tmp_path / "alone.png"), asdict(request)


def test_what_was_told_of_a_job_stays_what_it_was(jobs):
    (request, second) = make_requests(make_entry(2), jobs._settings)
    visitor = visitor_of(new_secret())
    told = []
    own = jobs._runner.generate

    def generate(*args, **options):
        told.append(jobs.status(visitor, name))
        return own(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs._runner, "generate", generate)
        name = jobs.submit(visitor, (request, second)).id
        wait_for(jobs, visitor, name)
    assert [len(status["images"]) for status in told] == [0, 1]


def test_an_upload_that_is_forgotten_meanwhile(jobs):
    visitor = visitor_of(new_secret())
    upload = jobs._store.new_upload(visitor)
    with pytest.raises(RequestError, match="uploaded image is gone"):
        jobs.submit(visitor, make_requests(make_entry(0), jobs._settings), upload, "x", (64, 64))
    assert [path.name for path in (jobs._store.root / visitor).iterdir()] == ["uploads"]
    assert jobs.active(visitor) == []


@pytest.mark.parametrize("act", ["new_upload", "remove_older"])
def test_uploads_that_another_thread_removes_meanwhile(monkeypatch, tmp_path, act):
    store, visitor = Store(tmp_path), visitor_of(new_secret())
    for _ in range(MAX_UPLOADS):
        Image.new("RGB", (8, 8)).save(store.new_upload(visitor), "PNG")
    folder = store.root / visitor / "uploads"
    first, *_, last = sorted(folder.iterdir())
    own_stat, own_unlink = Path.stat, Path.unlink

    def stat(path, **options):
        if path == first:
            own_unlink(path, missing_ok=True)
        return own_stat(path, **options)

    def unlink(path, **options):
        if path.parent == folder:
            own_unlink(path, missing_ok=True)
        return own_unlink(path, **options)

    monkeypatch.setattr(store_module.Path, "stat", stat)
    monkeypatch.setattr(store_module.Path, "unlink", unlink)
    if act == "new_upload":
        assert not store.new_upload(visitor).exists()
    else:
        store.remove_older(1, now=time.time() + 2 * 86400)
        assert list(folder.iterdir()) == []
    assert not first.exists()
    assert act == "remove_older" or last.exists()
