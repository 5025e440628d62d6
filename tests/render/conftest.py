"""Rendering without a pipeline: a runner that draws what a request says."""

import hashlib
import multiprocessing
import time
from dataclasses import asdict

import pytest
import torch

from clear_dit.pipelines.decoding.image_files import save_rows
from clear_dit.versions import __version__


class FakeRunner:
    """Generates noise that depends on the request, as `PipelineRunner` would.

    Args:
        seconds: that an image takes.
        fail: prompts to errors.
        log: a file that gets a line for every image that is begun.
    """

    def __init__(self, seconds=0.0, fail=None, log=None):
        self.seconds, self.fail, self.log = seconds, fail or {}, log

    def __call__(self, request):
        return self

    def generate(self, request, out, *, on_step=None, should_stop=None, notes=None, progress=False):
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(f"{out.name}\n")
        time.sleep(self.seconds)
        if request.prompt in self.fail:
            raise self.fail[request.prompt]
        digest = hashlib.sha256(repr(request).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        strip = torch.rand(3, request.height, request.width, generator=generator) * 2 - 1
        settings = asdict(request) | {"version": __version__, "impl": "fake"} | notes
        save_rows([strip], out, height=request.height, width=request.width, settings=settings)
        told = {"impl": "fake", "quantised": None, "peak_memory_mb": 1.0}
        return told | {"seconds": {"total": self.seconds}}


@pytest.fixture
def fake_runner():
    """The class."""
    return FakeRunner


@pytest.fixture
def one_thread():
    """PyTorch without a pool of threads, which a forked process would wait for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fork(one_thread):
    """A function that runs another one in a forked process, and returns that; killed at the end."""
    context = multiprocessing.get_context("fork")
    started = []

    def start(function, *args, **kwargs):
        process = context.Process(target=function, args=args, kwargs=kwargs)
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()
