"""What is on the disk, and who may see it."""

import os
import time

import pytest

from clear_dit.app.caller import new_secret, visitor_of
from clear_dit.app.settings import MAX_UPLOADS
from clear_dit.app.store import Store, new_name
from clear_dit.errors import RequestError


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


def add(store, visitor, state="done", **more):
    record = {"id": new_name(), "state": state, "created": time.time(), "images": [], "entry": {}}
    record |= more
    folder = store.new_folder(visitor, record["id"])
    (folder / "clear.png").write_bytes(b"png")
    store.write(visitor, record)
    return record["id"]


def test_a_visitor_sees_only_what_is_theirs(store):
    one, two = (visitor_of(new_secret()) for _ in range(2))
    job = add(store, one)
    assert [found["id"] for found in store.history(one)] == [job]
    assert store.folder(one, job).is_dir()
    assert store.folder(two, job) is None
    assert store.read(two, job) is None
    assert store.history(two) == []


@pytest.mark.parametrize("name", ["..", "../x", "", "a" * 21, "a" * 23, "a/b" * 7, "\0" * 22])
def test_names_that_are_none_find_nothing(store, name):
    visitor = visitor_of(new_secret())
    add(store, visitor)
    assert store.folder(visitor, name) is None
    assert store.upload(visitor, name) is None


def test_the_secret_is_not_on_the_disk(store, tmp_path):
    secret = new_secret()
    add(store, visitor_of(secret))
    assert not [path for path in tmp_path.rglob("*") if secret in str(path)]


def test_what_a_dead_server_left_was_stopped(store):
    visitor = visitor_of(new_secret())
    waiting, running, done = (add(store, visitor, s) for s in ("waiting", "running", "done"))
    (store.folder(visitor, running) / "image").write_bytes(b"png")
    store.end_interrupted()
    for job in (waiting, running):
        assert store.read(visitor, job)["state"] == "stopped"
        assert "stopped" in store.read(visitor, job)["error"]
        assert not (store.folder(visitor, job) / "clear.png").exists()
    assert (store.folder(visitor, running) / "image").exists(), "it can be run again"
    assert store.read(visitor, done)["state"] == "done"
    assert (store.folder(visitor, done) / "clear.png").exists()


def test_a_record_of_an_earlier_server_is_read(store):
    visitor = visitor_of(new_secret())
    record = {"id": new_name(), "state": "done", "created": 1.0, "error": None, "images": []}
    record |= {"prompt": "a", "model": "demo", "height": 64, "width": 96, "radius": 8, "steps": 2}
    record |= {"down_factor": 1, "guidance": 2.0, "seed": 3, "image": "x.png"}
    store.new_folder(visitor, record["id"])
    store.write(visitor, record | {"attention": ["clear", "full"]})
    (found,) = store.history(visitor)
    assert found["entry"]["attention"] == "both"
    assert (found["entry"]["width"], found["image_name"]) == (96, "x.png")


def test_links_are_not_followed(store, tmp_path):
    visitor = visitor_of(new_secret())
    job = add(store, visitor)
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "job.json").write_text('{"id": "x", "state": "done", "created": 1, "entry": {}}')
    (secret / "clear.png").write_bytes(b"secret")
    folder = store.folder(visitor, job)
    assert store.file(visitor, job, "clear.png")
    (folder / "full.png").symlink_to(secret / "clear.png")
    (folder / "full_files").symlink_to(secret)
    assert store.file(visitor, job, "full.png") is None
    assert store.file(visitor, job, "full_files", "clear.png") is None
    assert store.file(visitor, job, "..", job, "clear.png") is None
    linked = new_name()
    (store.root / visitor / linked).symlink_to(secret)
    assert store.folder(visitor, linked) is None
    assert [found["id"] for found in store.history(visitor)] == [job]
    upload = store.new_upload(visitor)
    upload.unlink()
    upload.symlink_to(secret / "clear.png")
    assert store.upload(visitor, upload.name) is None
    store.end_interrupted()
    store.remove(visitor, job)
    assert (secret / "clear.png").exists()


def test_a_disk_that_is_nearly_full_takes_nothing(store, monkeypatch):
    visitor = visitor_of(new_secret())
    monkeypatch.setattr("clear_dit.app.store.MIN_FREE_BYTES", 2**80)
    for act in (store.new_upload, lambda who: store.new_folder(who, new_name())):
        with pytest.raises(RequestError, match="disk is nearly full"):
            act(visitor)
    assert not (store.root / visitor).exists()


def test_old_images_and_uploads_are_removed(store):
    visitor = visitor_of(new_secret())
    old, new, running = add(store, visitor), add(store, visitor), add(store, visitor, "running")
    upload = store.new_upload(visitor)
    upload.write_bytes(b"png")
    past = time.time() - 2 * 86400
    for path in (upload, *(store.folder(visitor, job) / "job.json" for job in (old, running))):
        os.utime(path, (past, past))
    assert store.remove_older(days=1) == 2
    assert store.folder(visitor, old) is None
    assert not upload.exists()
    assert store.folder(visitor, new)
    assert store.folder(visitor, running), "a job at work is not removed"


def test_uploads_are_bounded(store, monkeypatch):
    visitor = visitor_of(new_secret())
    for number in range(MAX_UPLOADS + 3):
        path = store.new_upload(visitor)
        path.with_suffix(".jpg").write_bytes(b"jpg")
        os.utime(path, (number, number))
    assert len(list(path.parent.iterdir())) == 2 * MAX_UPLOADS
    assert path.exists()
    monkeypatch.setattr("clear_dit.app.store.MAX_UPLOADS_IN_ALL", MAX_UPLOADS)
    with pytest.raises(RequestError, match="too many uploads"):
        store.new_upload(visitor_of(new_secret()))
