"""Forty jobs of the demo, killed again and again: every image once, as if never killed."""

import json
import random
import signal
import time

import pytest
from support.rendering import assert_complete, assert_same, assert_true_so_far, images
from support.slow import slow

from clear_dit.generation.runner import PipelineRunner
from clear_dit.render.manifest import read_manifest
from clear_dit.render.run import render

FLAGS = {"steps": 1, "radius": 2, "weights": "none", "device": "cpu"}
SIZES = [(64, 64), (64, 96), (96, 64), (80, 80), (64, 128)]
JOBS = 40


@pytest.fixture(scope="module")
def runner():
    """Loaded once; every forked process has it."""
    loaded = PipelineRunner("demo", "float32", "cpu")
    return lambda *_: loaded


@pytest.fixture
def jobs(tmp_path):
    """Three of four have an id; some switch the attention or the weights."""
    path = tmp_path / "jobs.jsonl"
    with path.open("w") as file:
        for number in range(JOBS):
            height, width = SIZES[number % len(SIZES)]
            line = {"prompt": f"a house, number {number}", "height": height, "width": width}
            if number % 4:
                line |= {"id": f"house-{number}", "seed": number}
            if number % 7 == 0:
                line |= {"radius": 4, "weights": "auto"}
            if number % 11 == 0:
                line |= {"attention": "full"}
            file.write(f"{json.dumps(line)}\n")
    return path


@slow
def test_killed_at_any_moment_nothing_is_lost_or_done_twice(fork, runner, jobs, tmp_path):
    def generate(out):
        return render(jobs, out, FLAGS, progress=False, make_runner=runner)

    begin = time.monotonic()
    assert generate(tmp_path / "whole")["generated"] == JOBS
    seconds = time.monotonic() - begin
    expected = images(tmp_path / "whole")
    assert len(expected) == JOBS

    chance, out, alone = random.Random(7), tmp_path / "killed", []
    for _ in range(5):
        before = len(images(out))
        process = fork(generate, out)
        process.join(timeout=chance.uniform(0.05, 0.25) * seconds)
        process.kill()
        process.join()
        if (out / "manifest.jsonl").exists():
            alone.append(assert_true_so_far(out) - before)
    assert sum(alone) > 0
    result = generate(out)
    assert result["generated"] == JOBS - sum(alone)
    assert_same(out, expected)
    assert_complete(out, JOBS)

    # The same with two processes: at each moment one of them dies, or both, and is started anew.
    shared = tmp_path / "shared"
    pair = [fork(generate, shared), fork(generate, shared)]
    for _ in range(5):
        time.sleep(chance.uniform(0.02, 0.09) * seconds)
        victims = chance.sample(range(2), chance.choice((1, 1, 2)))
        for one in victims:
            pair[one].kill()
        for one in victims:
            pair[one].join()
            assert pair[one].exitcode == -signal.SIGKILL  # it was at work
            if (shared / "manifest.jsonl").exists():
                assert_true_so_far(shared)
            pair[one] = fork(generate, shared)
    for process in pair:
        process.join(timeout=600)
    assert [process.exitcode for process in pair] == [0, 0]
    assert_same(shared, expected)
    assert_complete(shared, JOBS)


def test_two_processes_generate_every_image_once(fork, fake_runner, jobs, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    runner = fake_runner(seconds=0.02, log=log)
    processes = [
        fork(render, jobs, out, FLAGS, progress=False, make_runner=runner) for _ in range(3)
    ]
    for process in processes:
        process.join(timeout=300)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    begun = log.read_text().split()
    assert len(begun) == len(set(begun)) == JOBS
    assert_complete(out, JOBS)


def test_a_dead_owners_job_is_taken_over(fork, fake_runner, tmp_path):
    jobs = tmp_path / "jobs.txt"
    jobs.write_text("a house\n")
    out, log = tmp_path / "out", tmp_path / "log"
    slow, quick = fake_runner(seconds=600, log=log), fake_runner(log=log)
    owner = fork(render, jobs, out, FLAGS, progress=False, make_runner=slow)
    while not log.exists():
        time.sleep(0.02)
    other = fork(render, jobs, out, FLAGS, progress=False, make_runner=quick)
    other.join(timeout=1.5)
    assert other.is_alive()  # it waits for the owner
    assert len(log.read_text().split()) == 1
    owner.kill()
    other.join(timeout=120)
    assert other.exitcode == 0
    (entry,) = read_manifest(out / "manifest.jsonl").values()
    assert entry["status"] == "done"


@pytest.mark.parametrize(
    ("name", "told"),
    [("a", "another job, at which another"), ("b", "another job in this folder, of line 1 of")],
)
def test_another_render_may_not_take_an_id_that_is_at_work(fork, fake_runner, tmp_path, name, told):
    out, log = tmp_path / "out", tmp_path / "log"
    for file, prompt in (("a", "a house"), (name, "a cat")):
        path = tmp_path / f"{file}.jsonl"
        path.write_text(json.dumps({"prompt": prompt, "id": "x"}) + "\n")
        if prompt == "a house":
            runner = fake_runner(seconds=600, log=log)
            fork(render, path, out, FLAGS, progress=False, make_runner=runner)
            while not log.exists():
                time.sleep(0.02)
    with pytest.raises(ValueError, match=f"line 1: the id 'x' is that of {told}"):
        render(path, out, FLAGS, progress=False, make_runner=runner)
