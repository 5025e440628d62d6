"""Every accepted job ends, whatever the runner does; a failure harms no other job."""

import base64
import io
import threading
import time

import pytest
import torch
from PIL import Image
from support.app_jobs import SMALL, ended, make_actions, visitors
from support.slow import slow

from clear_dit.app.settings import MAX_JOBS
from clear_dit.app.tiles import write_tiles
from clear_dit.errors import RequestError
from clear_dit.generation.runner import PipelineRunner, Step, Stopped
from clear_dit.pipelines.decoding.colours import srgb_profile
from clear_dit.pipelines.decoding.image_files import save_rows


class ScriptedRunner(PipelineRunner):
    """Does what the prompt says: raises an error, or waits for `go` and writes a grey image."""

    go = threading.Event()

    def generate(self, request, out, *, on_step=None, should_stop=None, notes=None, progress=False):
        tokens = request.height * request.width // 256
        channels = self.pipe.transformer.config.in_channels
        for step in range(1, request.steps + 1):
            sigma = 1 - step / request.steps
            latents = torch.zeros(1, tokens, channels)
            size = (request.height, request.width)
            on_step(Step(step, request.steps, 1, 1, *size, sigma, latents))
            if should_stop():
                raise Stopped
        if request.prompt == "memory":
            raise MemoryError("it does not fit; ask for fewer pixels.")
        if request.prompt == "disk":
            out.write_bytes(b"half")
            raise OSError(28, "/secret/path could not be written", str(out))
        if request.prompt == "crash":
            raise RuntimeError("/secret/path")
        while not self.go.wait(0.01):
            if should_stop():
                raise Stopped
        strips = [torch.zeros(3, request.height, request.width)]
        save_rows(strips, out, height=request.height, width=request.width, settings={})
        seconds = {"total": 1.0, "text": 0.1, "denoise": 0.8, "decode": 0.1}
        size = {"height": request.height, "width": request.width}
        how = {"impl": "tiled", "far": False, "weights": None}
        return {**how, "seconds": seconds, "peak_memory_mb": 1.0, **size}


@pytest.fixture(scope="module")
def runner():
    return ScriptedRunner("demo", "float32", "cpu")


@pytest.fixture
def actions(tmp_path, runner):
    runner.go.clear()
    actions = make_actions(tmp_path, lambda *wanted: runner, queue_size=16, host="0.0.0.0")
    actions.jobs.start("demo", "float32", "cpu")
    yield actions
    actions.jobs.stop()


def submit(actions, caller, prompt="a house", **more):
    (found,) = actions.submit(SMALL | {"prompt": prompt} | more, 1, caller)
    return found["id"]


def phase(actions, caller, job, words):
    while actions.status(job, caller)["phase"] != words:
        time.sleep(0.01)


@slow
@pytest.mark.parametrize(
    ("prompt", "words"),
    [("memory", "fewer pixels"), ("disk", "could not be written"), ("crash", "went wrong")],
)
def test_a_failure_is_told_to_its_visitor_and_harms_no_other(actions, runner, prompt, words):
    one, two = visitors(2)
    bad, good = submit(actions, one, prompt), submit(actions, two)
    runner.go.set()
    found = ended(actions, one, bad)
    assert found["state"] == "failed"
    assert words in found["error"]
    assert "/secret" not in found["error"]
    folder = actions.store.folder(one.owner, bad)
    assert [path.name for path in folder.iterdir()] == ["job.json"]
    assert ended(actions, two, good)["state"] == "done"


def test_places_progress_and_cancel(actions, runner):
    one, two, three = visitors(3)
    running = submit(actions, one)
    phase(actions, one, running, "writing the image")
    told = actions.status(running, one)
    assert told["fraction"] == pytest.approx(1)
    kind, data = told["preview"].split(",")
    assert kind == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as preview:
        assert preview.info["icc_profile"] == srgb_profile()
    first, second = submit(actions, two), submit(actions, three)
    assert [actions.status(j, v)["place"] for v, j in ((two, first), (three, second))] == [1, 2]
    with pytest.raises(RequestError, match="no such image of yours"):
        actions.status(second, two)
    assert not actions.jobs.cancel(two.owner, second), "another visitor's job"
    assert actions.jobs.cancel(two.owner, first)
    assert actions.status(first, two)["state"] == "cancelled"
    assert actions.status(second, three)["place"] == 1
    assert actions.jobs.cancel(one.owner, running)
    assert ended(actions, one, running)["state"] == "cancelled"
    runner.go.set()
    assert ended(actions, three, second)["state"] == "done"
    assert not actions.jobs.cancel(three.owner, second), "it has ended"


@pytest.mark.parametrize("remove", [False, True])
def test_what_is_cancelled_while_tiles_are_cut_is_cancelled(actions, runner, monkeypatch, remove):
    (one,) = visitors(1)
    cutting, go = threading.Event(), threading.Event()

    def cut(path, folder):
        cutting.set()
        assert go.wait(60)
        return write_tiles(path, folder)

    monkeypatch.setattr("clear_dit.app.worker.write_tiles", cut)
    runner.go.set()
    job = submit(actions, one)
    assert cutting.wait(60)
    if remove:
        actions.remove(job, one)
    else:
        assert actions.jobs.cancel(one.owner, job)
    go.set()
    assert ended(actions, one, job)["state"] == "cancelled"
    assert actions.all(one) == []
    assert [path.name for path in actions.store.folder(one.owner, job).iterdir()] == ["job.json"]


@slow
def test_both_attentions_are_one_job(actions, runner):
    (one,) = visitors(1)
    runner.go.set()
    found = ended(actions, one, submit(actions, one, attention="both"))
    assert [image["attention"] for image in found["images"]] == ["clear", "full"]
    assert found["images"][0]["flops"] < found["images"][1]["flops"]
    assert actions.store.history(one.owner) == [found]


def test_several_images_are_jobs_with_the_next_seeds_all_or_none(actions):
    (one,) = visitors(1)
    found = actions.submit(SMALL | {"seed": 7}, 4, one)
    assert [job["entry"]["seed"] for job in found] == [7, 8, 9, 10]
    assert "--seed 9" in found[2]["command"]
    with pytest.raises(RequestError, match="You have 4 images in the queue and may have 6"):
        actions.submit(SMALL, 3, one)
    assert len(actions.all(one)) == 4
    for images in (0, 5, "2", 1.5, None):
        with pytest.raises(RequestError, match="number of images must be from 1 to 4"):
            actions.submit(SMALL, images, one)


def test_a_visitors_an_addresses_and_everybodys_share_are_bounded(actions):
    """New cookies from one address take no more than half of the queue."""
    crowd = visitors(4, address="10.0.0.1")
    for caller in crowd[:2]:
        actions.submit(SMALL, 4, caller)
    for caller in crowd:
        with pytest.raises(RequestError, match="8 images of your address"):
            submit(actions, caller)
    others = [visitors(1, f"10.0.1.{number}")[0] for number in range(3)]
    for caller in others:
        for _ in range(3):
            submit(actions, caller)
    # One runs, 16 wait.
    while actions.jobs.waiting != 16:
        time.sleep(0.01)
    (late,) = visitors(1, "10.0.2.1")
    with pytest.raises(RequestError, match=r"queue is full \(16 are waiting\)"):
        submit(actions, late)
    assert not actions.estimate(SMALL, 1, late)["allowed"]
    assert "queue is full" in actions.estimate(SMALL, 1, late)["reason"]
    assert MAX_JOBS == 6


def test_who_asks_take_turns(actions, runner):
    """Who has sent many waits for them; who sends one comes soon."""
    many, few = visitors(2)
    running = submit(actions, many)
    phase(actions, many, running, "writing the image")
    theirs = [submit(actions, many) for _ in range(4)]
    mine = submit(actions, few)
    assert actions.status(mine, few)["place"] == 1
    assert [actions.status(job, many)["place"] for job in theirs] == [2, 3, 4, 5]
    runner.go.set()
    assert ended(actions, few, mine)["state"] == "done"


def test_what_the_server_stopped_can_be_run_again(actions, runner, tmp_path):
    one, two = visitors(2)
    upload = actions.store.new_upload(one.owner)
    Image.new("RGB", (128, 128)).save(upload, "PNG")
    names = [
        (one, submit(actions, one, image=upload.name)),
        (two, submit(actions, two)),
        (one, submit(actions, one, prompt="another")),
    ]
    actions.jobs.stop()
    with pytest.raises(RequestError, match="being stopped"):
        submit(actions, one)
    runner.go.set()
    again = make_actions(tmp_path, lambda *wanted: runner)
    again.jobs.start("demo", "float32", "cpu")
    for caller, name in names:
        found = again.status(name, caller)
        assert found["state"] == "stopped"
        assert found["images"] == []
        (new,) = again.again(name, caller)
        assert new["entry"] == found["entry"]
        assert ended(again, caller, new["id"])["state"] == "done"
    assert {job["state"] for job in again.all(one)} == {"stopped", "done"}
    again.jobs.stop()


def test_a_request_the_pipeline_refuses_is_not_queued(actions):
    (one,) = visitors(1)
    upload = actions.store.new_upload(one.owner)
    Image.new("RGB", (32, 32)).save(upload, "PNG")
    with pytest.raises(RequestError, match="must have at least 64 pixels"):
        submit(actions, one, image=upload.name)
    assert actions.all(one) == []


def test_what_the_machine_cannot_hold_is_refused_before_it_is_queued(actions):
    (one,) = visitors(1)
    actions.memory = 2**24
    told = actions.estimate(SMALL, 1, one)
    assert not told["allowed"]
    assert told["field"] == "width"
    assert "the machine has 0" in told["reason"]
    with pytest.raises(RequestError, match="choose a smaller size"):
        submit(actions, one)
    assert actions.all(one) == []


def test_an_estimate_learns_from_images_and_outlasts_a_restart(actions, runner, tmp_path):
    (one,) = visitors(1)
    told = actions.estimate(SMALL | {"prompt": "a dragon in the desert"}, 1, one)
    assert (told["seconds"], told["queue_seconds"]) == (None, 0)
    assert told["flops"] > 0
    assert told["memory_total"] > told["memory_bytes"] > 0
    assert told["stages"] == [{"width": 256, "height": 256, "steps": 3, "attention": "clear"}]
    assert any("dragon" in note for note in told["notes"])
    runner.go.set()
    ended(actions, one, submit(actions, one))
    assert actions.estimate(SMALL, 1, one)["seconds"] > 0
    again = make_actions(tmp_path, lambda *wanted: runner)
    assert again.estimate(SMALL, 1, one)["seconds"] > 0


def test_deleting_a_job_removes_its_files_or_cancels_it(actions, runner):
    (one,) = visitors(1)
    running = submit(actions, one)
    actions.remove(running, one)
    assert ended(actions, one, running)["state"] == "cancelled"
    runner.go.set()
    done = submit(actions, one)
    ended(actions, one, done)
    assert actions.store.set_favourite(one.owner, done, True)
    assert actions.all(one)[0]["favourite"]
    (stranger,) = visitors(1)
    with pytest.raises(RequestError, match="no such image"):
        actions.remove(done, stranger)
    actions.remove(done, one)
    assert actions.store.folder(one.owner, done) is None
    assert actions.all(one) == []
