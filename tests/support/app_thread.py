"""A server in a thread of this process, whose images are grey and there at once."""

import threading
import time
from contextlib import contextmanager

import torch
import uvicorn

from clear_dit.app.application import make_application
from clear_dit.app.jobs import Jobs
from clear_dit.app.server import bound_socket
from clear_dit.app.settings import Settings
from clear_dit.app.store import Store
from clear_dit.generation.runner import PipelineRunner, Step, Stopped
from clear_dit.pipelines.decoding.image_files import save_rows


class GreyRunner(PipelineRunner):
    """Takes its steps without a model, waits for `go`, and writes a grey image."""

    def __init__(self):
        super().__init__("demo", "float32", "cpu")
        self.go = threading.Event()
        self.go.set()

    def generate(self, request, out, *, on_step=None, should_stop=None, notes=None, progress=False):
        size = {"height": request.height, "width": request.width}
        tokens = request.height * request.width // 256
        for step in range(1, request.steps + 1):
            latents = torch.zeros(1, tokens, self.pipe.transformer.config.in_channels)
            sigma = 1 - step / request.steps
            on_step(Step(step, request.steps, 1, 1, *size.values(), sigma, latents))
        while not self.go.wait(0.01):
            if should_stop():
                raise Stopped
        if request.prompt == "memory":
            raise MemoryError("it does not fit; ask for fewer pixels.")
        save_rows([torch.zeros(3, *size.values())], out, **size, settings={})
        seconds = {"total": 1.0, "text": 0.1, "denoise": 0.8, "decode": 0.1}
        about = {"impl": "tiled", "far": False, "weights": None, "peak_memory_mb": 1.0}
        return about | {"seconds": seconds} | size


@contextmanager
def serving(folder, runner, **settings):
    """The URL of a server, and its queue."""
    defaults = {"models": ("demo",), "device": "cpu", "page": False, "max_pixels": 512**2}
    with bound_socket("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        made = Settings(**(defaults | settings), out=folder, port=port)
        store = Store(folder)
        jobs = Jobs(made, store, lambda *wanted: runner)
        jobs.start("demo", "float32", "cpu")
        server = uvicorn.Server(
            uvicorn.Config(make_application(made, store, jobs), log_config=None, access_log=False)
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            end = time.monotonic() + 30
            while not server.started:
                assert time.monotonic() < end, "the server does not start"
                time.sleep(0.01)
            yield f"http://127.0.0.1:{port}", jobs
        finally:
            runner.go.set()
            server.should_exit = True
            thread.join()
