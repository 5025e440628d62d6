"""`clear-dit serve` in a process of its own, with the demo pipeline: its images, and its load."""

import base64
import io
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import httpx2
import numpy as np
import pytest
from PIL import Image
from support.app_server import ROOT, AppServer
from support.command_line import run
from support.packages import need
from support.slow import slow

need("openai")

import openai  # noqa: E402
from openai import OpenAI  # noqa: E402

pytestmark = slow
KEY = "a-key-of-24-characters!!"
# The long version: CLEAR_DIT_LOAD_SECONDS=60 CLEAR_DIT_LOAD_CLIENTS=40.
LOAD_SECONDS = float(os.environ.get("CLEAR_DIT_LOAD_SECONDS", "15"))
CLIENTS = int(os.environ.get("CLEAR_DIT_LOAD_CLIENTS", "8"))
SMALL = {"prompt": "a red house", "size": "256x256", "extra_body": {"steps": 2}}


def connect(server, **options):
    return OpenAI(base_url=f"{server.url}v1", api_key=KEY, **({"max_retries": 0} | options))


def pixels(b64):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))).convert("RGB")).astype(float)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    options = ("--queue-size", "6", "--api-key", KEY)
    with (folder / "log").open("wb") as log, AppServer(
        folder / "out", *options, log=log, command=("-m", "clear_dit", "serve")
    ) as server:  # fmt: skip
        yield server
    text = (folder / "log").read_text()
    assert f"clear-dit serve: http://127.0.0.1:{server.port}/v1" in text
    assert "Traceback" not in text


def test_the_image_is_that_of_the_command_line(server, tmp_path):
    with connect(server) as client:
        found = client.images.generate(
            prompt="a blue house", size="512x256", extra_body={"steps": 6, "seed": 3, "radius": 8}
        )
    out = tmp_path / "a.png"
    command = [sys.executable, "-m", "clear_dit", "generate", "a blue house", "--out", str(out)]
    command += ["--width", "512", "--height", "256", "--steps", "6", "--seed", "3"]
    subprocess.run([*command, "--radius", "8"], check=True, cwd=ROOT, capture_output=True)
    with Image.open(out) as image:
        expected = np.asarray(image.convert("RGB")).astype(float)
    assert np.abs(pixels(found.data[0].b64_json) - expected).max() <= 1


def test_an_edit_keeps_what_strength_leaves(server):
    with connect(server) as client:
        found = client.images.generate(prompt="a blue house", size="512x512").data[0].b64_json
        file = io.BytesIO(base64.b64decode(found))
        distances = []
        for strength in (0.2, 0.9):
            more = {"strength": strength, "seed": 5}
            edited = client.images.edit(image=file, prompt="a pink balloon", extra_body=more)
            distances.append(np.abs(pixels(edited.data[0].b64_json) - pixels(found)).mean())
    assert distances[0] < 0.5 * distances[1], distances


def test_the_page_s_server_has_it_too_and_shows_its_images_to_nobody(app_server):
    with connect(app_server) as client, httpx2.Client(base_url=app_server.url) as page:
        page.get("/")  # which makes a visitor of it
        found = client.images.generate(**SMALL, response_format="url")
        assert page.get(found.data[0].url).headers["content-type"] == "image/png"
        assert page.get("/api/jobs").json() == {"jobs": [], "waiting": 0}


class Caller(threading.Thread):
    """Asks in all ways until the time is over, and notes what was answered."""

    def __init__(self, server, seed, end):
        super().__init__()
        self.server, self.end = server, end
        self.random = random.Random(seed)
        self.answers, self.wrong = [], []

    def run(self):
        with connect(self.server, timeout=300) as client:
            while time.monotonic() < self.end:
                try:
                    self.answers.append(self.ask(client))
                except openai.RateLimitError as error:
                    wait = int(error.response.headers["retry-after"])
                    self.answers.append("refused")
                    time.sleep(min(wait, 0.5))
                except Exception as error:
                    self.wrong.append(repr(error))

    def ask(self, client):
        way = self.random.choice(["answer", "answer", "url", "events", "leave", "bad"])
        if way == "bad":
            with pytest.raises(openai.BadRequestError):
                client.images.generate(**(SMALL | {"size": "17x17"}))
        elif way == "events":
            with client.images.generate(**SMALL, stream=True, partial_images=2) as stream:
                assert list(stream)[-1].b64_json
        elif way == "leave":
            with suppress(openai.APITimeoutError):
                client.with_options(timeout=self.random.random()).images.generate(**SMALL)
        else:
            kind = "url" if way == "url" else "b64_json"
            (image,) = client.images.generate(**SMALL, response_format=kind).data
            assert image.url if way == "url" else image.b64_json
        return way


def test_many_clients_are_all_answered_and_memory_comes_back(server):
    with connect(server) as client:
        for _ in range(3):
            client.images.generate(**SMALL)
        before = server.memory_mb()
        end = time.monotonic() + LOAD_SECONDS
        callers = [Caller(server, seed, end) for seed in range(CLIENTS)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(timeout=LOAD_SECONDS + 300)
            assert not caller.is_alive()
        assert [caller.wrong for caller in callers] == [[]] * CLIENTS
        ways = [way for caller in callers for way in caller.answers]
        counts = {way: ways.count(way) for way in sorted(set(ways))}
        assert {"answer", "bad", "events"} <= set(counts), counts
        if CLIENTS > 7:  # more than have a place
            assert "refused" in counts
        assert client.images.generate(**SMALL).data
        after = server.memory_mb()
    print(
        f"{CLIENTS} clients, {LOAD_SECONDS:g} s: {counts}, memory {before:.0f} -> {after:.0f} MiB"
    )
    assert after < before + 100


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("serve", "--api-key", "short"), "at least 16 characters"),
        (("serve", "--api-key", "with a space and more"), "no spaces"),
        (("serve", "--api-key", KEY, "--api-key", KEY), "every key once"),
        (("serve", "--max-pixels", "5"), "--max-pixels"),
        (("serve", "--model", "nowhere/nothing-of-it"), "nothing-of-it"),
        (("app", "--api-key", KEY), "give --auth"),
    ],
)
def test_a_bad_start_is_one_line_and_status_2(tmp_path, capsys, options, words):
    assert run(*options, "--out", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_a_stopped_server_ends_what_it_makes(tmp_path):
    options, command = ("--api-key", KEY), ("-m", "clear_dit", "serve")
    more = {"stream": True, "partial_images": 1, "extra_body": {"steps": 100}}
    with (
        AppServer(tmp_path / "out", *options, command=command) as server,
        connect(server) as client,
    ):
        stream = client.images.generate(prompt="a", size="1024x1024", **more)
        server.process.send_signal(signal.SIGTERM)
        start, events = time.monotonic(), []
        with suppress(openai.APIError, httpx2.HTTPError):
            events.extend(one.type for one in stream)
        assert "image_generation.completed" not in events
        server.process.wait(timeout=60)
        assert time.monotonic() - start < 30
    assert not list((tmp_path / "out").glob("visitors/*/*/clear.png"))
