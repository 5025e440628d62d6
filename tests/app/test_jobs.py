"""Every accepted job ends, whatever the runner does; a failure harms no other job."""

import base64
import io
import threading
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image
from support.slow import slow

from clear_dit.app.jobs import Jobs
from clear_dit.app.request import Entry, make_requests
from clear_dit.app.settings import MAX_JOBS_OF_VISITOR, Settings
from clear_dit.app.store import ENDED, Store, new_secret, visitor_of
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
def jobs(tmp_path, runner):
    runner.go.clear()
    settings = Settings(models=("demo",), out=tmp_path, queue_size=4, device="cpu")
    store = Store(tmp_path)
    jobs = Jobs(settings, store, lambda *wanted: runner)
    jobs.start("demo", "float32", "cpu")
    jobs.settings, jobs.store = settings, store
    yield jobs
    jobs.stop()


def submit(jobs, visitor, prompt="a house", attention="clear"):
    entry = Entry(prompt, 256, 256, attention, 8, 1, None, 3, 2.0, 0, "demo")
    return jobs.submit(visitor, make_requests(entry, jobs.settings)).id


def ended(jobs, visitor, job):
    end = time.monotonic() + 60
    while (found := jobs.status(visitor, job))["state"] not in ENDED:
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


def visitors(count):
    return [visitor_of(new_secret()) for _ in range(count)]


@slow
@pytest.mark.parametrize(
    ("prompt", "words"),
    [("memory", "fewer pixels"), ("disk", "could not be written"), ("crash", "went wrong")],
)
def test_a_failure_is_told_to_its_visitor_and_harms_no_other(jobs, prompt, words):
    one, two = visitors(2)
    bad, good = submit(jobs, one, prompt), submit(jobs, two)
    jobs._runner.go.set()
    found = ended(jobs, one, bad)
    assert found["state"] == "failed"
    assert words in found["error"]
    assert "/secret" not in found["error"]
    assert [path.name for path in jobs.store.folder(one, bad).iterdir()] == ["job.json"]
    assert ended(jobs, two, good)["state"] == "done"


def test_places_progress_and_cancel(jobs):
    one, two, three = visitors(3)
    running = submit(jobs, one)
    while jobs.status(one, running)["phase"] != "writing the image":
        time.sleep(0.01)
    told = jobs.status(one, running)
    assert told["fraction"] == pytest.approx(1)
    kind, data = told["preview"].split(",")
    assert kind == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as preview:
        assert preview.info["icc_profile"] == srgb_profile()
    first, second = submit(jobs, two), submit(jobs, three)
    assert [jobs.status(v, j)["place"] for v, j in ((two, first), (three, second))] == [1, 2]
    assert jobs.status(two, second) is None, "another visitor's job"
    assert not jobs.cancel(two, second)
    assert jobs.cancel(two, first)
    assert jobs.status(two, first)["state"] == "cancelled"
    assert jobs.status(three, second)["place"] == 1
    assert jobs.cancel(one, running)
    assert ended(jobs, one, running)["state"] == "cancelled"
    jobs._runner.go.set()
    assert ended(jobs, three, second)["state"] == "done"
    assert not jobs.cancel(three, second), "it has ended"


@slow
def test_both_attentions_are_one_job(jobs):
    (one,) = visitors(1)
    jobs._runner.go.set()
    found = ended(jobs, one, submit(jobs, one, attention="both"))
    assert [image["attention"] for image in found["images"]] == ["clear", "full"]
    assert found["images"][0]["flops"] < found["images"][1]["flops"]
    assert jobs.store.history(one) == [found]


def test_the_queue_and_a_visitors_share_are_bounded(jobs):
    one, two, three = visitors(3)
    mine = [submit(jobs, one) for _ in range(MAX_JOBS_OF_VISITOR)]
    with pytest.raises(RequestError, match="as many as one visitor"):
        submit(jobs, one)
    while jobs.status(one, mine[0])["state"] != "running":
        time.sleep(0.01)
    submit(jobs, two), submit(jobs, two)
    with pytest.raises(RequestError, match=r"queue is full \(4 are waiting\)"):
        submit(jobs, three)


def test_stopping_ends_all_jobs(jobs):
    one, two = visitors(2)
    names = [(one, submit(jobs, one)), (two, submit(jobs, two)), (one, submit(jobs, one))]
    jobs.stop()
    assert {jobs.store.read(*name)["state"] for name in names} == {"cancelled"}
    with pytest.raises(RequestError, match="being stopped"):
        submit(jobs, one)


@slow
def test_a_request_the_pipeline_refuses_is_not_queued(jobs):
    (one,) = visitors(1)
    entry = Entry("a house", 256, 256, "clear", 8, 1, None, 3, 2.0, 0, "demo")
    (request,) = make_requests(entry, jobs.settings)
    with pytest.raises(RequestError, match="strength has 3 values"):
        jobs.submit(one, (replace(request, strength=(0.1, 0.2, 0.3)),))
    assert jobs.active(one) == []
