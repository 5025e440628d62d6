"""What is on the disk, and who may see it."""

import os
import time

import pytest

from clear_dit.app.store import MAX_UPLOADS, Store, new_name, new_secret, visitor_of


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


def add(store, visitor, state="done", **more):
    record = {"id": new_name(), "state": state, "created": time.time(), "images": [], **more}
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


def test_what_a_dead_server_left_has_failed(store):
    visitor = visitor_of(new_secret())
    waiting, running, done = (add(store, visitor, s) for s in ("waiting", "running", "done"))
    store.end_interrupted()
    for job in (waiting, running):
        assert store.read(visitor, job)["state"] == "failed"
        assert "stopped" in store.read(visitor, job)["error"]
        assert [path.name for path in store.folder(visitor, job).iterdir()] == ["job.json"]
    assert store.read(visitor, done)["state"] == "done"
    assert (store.folder(visitor, done) / "clear.png").exists()


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


def test_uploads_of_a_visitor_are_bounded(store):
    visitor = visitor_of(new_secret())
    for number in range(MAX_UPLOADS + 3):
        path = store.new_upload(visitor)
        path.write_bytes(b"png")
        os.utime(path, (number, number))
    assert len(list(path.parent.iterdir())) == MAX_UPLOADS
    assert path.exists()
