"""Processes and threads that render into one folder: all images right, or one of them refused."""

import json
import threading

import pytest
from support.slow import slow
from support.threads import pixels_of

from clear_dit.errors import RequestError
from clear_dit.files import own_folder
from clear_dit.generation.runner import PipelineRunner
from clear_dit.render.claims import Claims
from clear_dit.render.run import render

FLAGS = {"steps": 1, "radius": 2, "weights": "none", "device": "cpu"}
SIZES = [(64, 64), (64, 96), (96, 64)]


@pytest.fixture(scope="module")
def runner():
    """Loaded once; every forked process has it."""
    loaded = PipelineRunner("demo", "float32", "cpu")
    return lambda *_: loaded


@pytest.fixture
def make_jobs(tmp_path):
    def make(count):
        path = tmp_path / "jobs.jsonl"
        with path.open("w") as file:
            for number in range(count):
                height, width = SIZES[number % len(SIZES)]
                line = {"prompt": f"a house, number {number}", "height": height, "width": width}
                line |= {"attention": "full"} if number % 3 == 1 else {}
                file.write(json.dumps(line) + "\n")
        return path

    return make


def images(folder):
    return {path.name: pixels_of(path) for path in folder.glob("[!.]*.png")}


@slow
@pytest.mark.parametrize("count", [6, 60])
def test_two_processes_make_the_images_of_one(fork, runner, make_jobs, tmp_path, count):
    jobs = make_jobs(count)
    render(jobs, tmp_path / "one", FLAGS, progress=False, make_runner=runner)
    processes = [
        fork(render, jobs, tmp_path / "two", FLAGS, progress=False, make_runner=runner)
        for _ in range(2)
    ]
    for process in processes:
        process.join(timeout=300)
    assert [process.exitcode for process in processes] == [0, 0]
    expected = images(tmp_path / "one")
    assert len(expected) == count
    assert images(tmp_path / "two") == expected


def test_a_second_thread_is_refused_and_takes_no_claims_away(fake_runner, fork, tmp_path):
    """Locks are a process's: two threads would have one another's, and end them."""
    jobs, out, log = tmp_path / "jobs.txt", tmp_path / "out", tmp_path / "log"
    jobs.write_text("a house\na red house\n")
    begun, go_on = threading.Event(), threading.Event()

    class Waiting(fake_runner):
        def generate(self, *args, **options):
            begun.set()
            assert go_on.wait(60)
            return super().generate(*args, **options)

    results = []
    first = threading.Thread(
        target=lambda: results.append(
            render(jobs, out, FLAGS, progress=False, make_runner=Waiting(log=log))
        )
    )
    first.start()
    assert begun.wait(60)
    with pytest.raises(RequestError, match="another thread of this process is at work"):
        render(jobs, out, FLAGS, progress=False, make_runner=fake_runner(log=log))
    # Another process takes the other job, and waits for this one.
    other = fork(render, jobs, out, FLAGS, progress=False, make_runner=fake_runner(log=log))
    other.join(timeout=1.5)
    assert other.is_alive()
    go_on.set()
    first.join(60)
    other.join(60)
    assert other.exitcode == 0
    assert results[0]["done"] == 2
    begun_images = log.read_text().split()
    assert len(begun_images) == len(set(begun_images)) == 2
    # The folder is free again.
    assert render(jobs, out, FLAGS, progress=False, make_runner=fake_runner())["done"] == 2


def test_after_an_error_the_folder_is_free(tmp_path):
    claims = Claims(tmp_path)
    with pytest.raises(KeyboardInterrupt), claims.leaving():
        raise KeyboardInterrupt
    again = Claims(tmp_path)
    with again.arriving() as alone:
        assert alone
    again.close()


def test_a_folder_of_ones_own_is_one_threads(tmp_path):
    with own_folder(tmp_path), pytest.raises(RequestError, match="another process"):
        own_folder(tmp_path).__enter__()
