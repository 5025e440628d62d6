"""Eight visitors at once: everybody gets the image they asked for, and nothing is left behind."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest
from PIL import Image
from support.app_jobs import ended, make_actions, visitors
from support.slow import slow
from support.threads import pixels_of

from clear_dit.app import store as store_module
from clear_dit.app.caller import new_secret, visitor_of
from clear_dit.app.entry import make_entry, make_requests
from clear_dit.app.settings import MAX_UPLOADS
from clear_dit.app.store import Store
from clear_dit.errors import RequestError
from clear_dit.generation.runner import PipelineRunner

VISITORS, IMAGES = 8, 3  # of each
SIZES = [(64, 64), (64, 96), (96, 64), (80, 48)]


@pytest.fixture(scope="module")
def runner():
    return PipelineRunner("demo", "float32", "cpu")


@pytest.fixture
def actions(tmp_path, runner):
    actions = make_actions(tmp_path, lambda *wanted: runner, queue_size=32)
    actions.jobs.start("demo", "float32", "cpu")
    yield actions
    actions.jobs.stop()


def make_given(number):
    height, width = SIZES[number % len(SIZES)]
    attention = ("clear", "full", "both")[number % 3]
    return {
        "prompt": f"a house, number {number}",
        "width": width,
        "height": height,
        "attention": attention,
        "radius": 4,
        "steps": 2,
        "seed": number,
    }


@slow
def test_everybody_gets_their_own_images(actions, runner, tmp_path):
    ready = threading.Barrier(VISITORS)

    def visit(number, who):
        found = []
        ready.wait(30)
        for image in range(IMAGES):
            given = make_given(number + VISITORS * image)
            (job,) = actions.submit(given, 1, who)
            assert ended(actions, who, job["id"])["state"] == "done"
            found.append((given, actions.store.folder(who.owner, job["id"])))
        history = actions.store.history(who.owner)[::-1]
        assert [one["entry"]["prompt"] for one in history] == [e["prompt"] for e, _ in found]
        return found

    with ThreadPoolExecutor(VISITORS) as pool:
        started = [pool.submit(visit, *one) for one in enumerate(visitors(VISITORS))]
        visits = [future.result(300) for future in started]
    for given, folder in (one for visit in visits for one in visit):
        requests = make_requests(make_entry(given, actions.settings), actions.settings)
        assert len(list(folder.glob("*.png"))) == len(requests)
        for request in requests:
            runner.generate(request, tmp_path / "alone.png")
            made = pixels_of(folder / f"{request.attention}.png")
            assert made == pixels_of(tmp_path / "alone.png"), asdict(request)


@slow
def test_what_was_told_of_a_job_stays_what_it_was(actions, runner):
    (caller,) = visitors(1)
    told = []
    own = runner.generate

    def generate(*args, **options):
        told.append(actions.status(job["id"], caller))
        return own(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "generate", generate)
        (job,) = actions.submit(make_given(2), 1, caller)
        ended(actions, caller, job["id"])
    assert [len(status["images"]) for status in told] == [0, 1]


@slow
def test_an_upload_that_is_forgotten_meanwhile(actions, monkeypatch):
    (caller,) = visitors(1)
    upload = actions.store.new_upload(caller.owner)
    Image.new("RGB", (64, 64)).save(upload, "PNG")
    own = actions.jobs.submit

    def submit(*args):
        upload.unlink()
        return own(*args)

    monkeypatch.setattr(actions.jobs, "submit", submit)
    with pytest.raises(RequestError, match="image to enlarge is gone"):
        actions.submit(make_given(0) | {"image": upload.name}, 1, caller)
    with pytest.raises(RequestError, match="image to enlarge is gone"):
        actions.submit(make_given(0) | {"image": upload.name}, 1, caller)
    folder = actions.store.root / caller.owner
    assert [path.name for path in folder.iterdir()] == ["uploads"]
    assert actions.all(caller) == []


def test_a_negative_prompt_that_would_do_nothing_is_told_so(actions):
    (caller,) = visitors(1)
    upload = actions.store.new_upload(caller.owner)
    Image.new("RGB", (1024, 1024)).save(upload, "PNG")
    entry = {"prompt": "a house", "negative_prompt": "blue", "width": 2048, "height": 2048}
    told = actions.estimate(entry | {"image": upload.name}, 1, caller)
    assert (told["allowed"], told["field"]) == (False, "negative_prompt")
    assert "leave it out, or set Strength" in told["reason"]
    assert actions.estimate(entry | {"image": upload.name, "strength": 0.3}, 1, caller)["allowed"]


@pytest.mark.parametrize("act", ["new_upload", "remove_older"])
def test_uploads_that_another_thread_removes_meanwhile(monkeypatch, tmp_path, act):
    store, visitor = Store(tmp_path), visitor_of(new_secret())
    for _ in range(MAX_UPLOADS):
        Image.new("RGB", (8, 8)).save(store.new_upload(visitor), "PNG")
    folder = store.root / visitor / "uploads"
    first, *_, last = sorted(folder.iterdir())
    own_lstat, own_unlink = Path.lstat, Path.unlink

    def lstat(path):
        if path == first:
            own_unlink(path, missing_ok=True)
        return own_lstat(path)

    def unlink(path, **options):
        if path.parent == folder:
            own_unlink(path, missing_ok=True)
        return own_unlink(path, **options)

    monkeypatch.setattr(store_module.Path, "lstat", lstat)
    monkeypatch.setattr(store_module.Path, "unlink", unlink)
    if act == "new_upload":
        assert store.new_upload(visitor).exists()
    else:
        store.remove_older(1, now=time.time() + 2 * 86400)
        assert not folder.exists()
    assert not first.exists()
    assert act == "remove_older" or last.exists()
