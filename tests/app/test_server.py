"""The server without a browser: its API, what it does not serve, and eight clients at once."""

import json
import os
import random
import threading
import time

import httpx
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image
from support.app_server import AppServer
from support.slow import slow

from clear_dit.app.guard import COOKIE
from clear_dit.app.store import ENDED, new_secret

pytestmark = slow
# The long version: CLEAR_DIT_LOAD_SECONDS=60.
LOAD_SECONDS = float(os.environ.get("CLEAR_DIT_LOAD_SECONDS", "15"))
SMALL = {"width": 256, "height": 256, "steps": 2}


OPENED = []


@pytest.fixture(scope="module", autouse=True)
def connections_end():
    """None is left to the garbage collector, which would warn in the middle of another test."""
    yield
    for client, http in OPENED:
        client.close()
        http.close()
    OPENED.clear()


def connect(server, secret=None):
    secret = secret or new_secret()
    client = Client(
        server.url,
        httpx_kwargs={"cookies": {COOKIE: secret}, "timeout": 120},
        verbose=False,
        download_files=False,
    )
    http = httpx.Client(base_url=server.url, cookies={COOKIE: secret}, timeout=120)
    OPENED.append((client, http))
    return client, http


@pytest.fixture(scope="module")
def done(app_server):
    """A visitor's finished image: client, its HTTP client and the result."""
    client, http = connect(app_server)
    result = client.predict("a red house", **SMALL, attention="both", api_name="/generate")
    assert result["state"] == "done"
    return client, http, result


def test_the_documented_api(done):
    client, http, result = done
    assert [one["attention"] for one in result["images"]] == ["clear", "full"]
    clear, full = result["images"]
    assert 0 < clear["flops"] <= full["flops"]
    for one in result["images"]:
        answer = http.get(one["file"])
        assert answer.status_code == 200
        assert len(answer.content) == one["bytes"]
    (found,) = client.predict(api_name="/history")
    assert found["id"] == result["id"]
    assert client.predict(result["id"], api_name="/status")["state"] == "done"
    assert client.predict(result["id"], api_name="/cancel") is False


def test_nobody_else_sees_an_image(app_server, done):
    _, http, result = done
    stranger, other = connect(app_server)
    name = result["id"]
    paths = [
        f"images/{name}",
        f"view/{name}",
        f"images/{name}/clear.png",
        f"images/{name}/clear/8/0_0.jpg",
    ]
    for path in paths:
        assert http.get(path).status_code == 200, path
        assert other.get(path).status_code == 404, path
    for function in ("/status",):
        with pytest.raises(AppError, match="no such image"):
            stranger.predict(name, api_name=function)
    assert stranger.predict(name, api_name="/cancel") is False
    assert stranger.predict(api_name="/history") == []


def test_nothing_else_of_the_disk_is_served(app_server, done):
    _, http, result = done
    (folder,) = app_server.out.glob(f"visitors/*/{result['id']}")
    secret = str(folder / "clear.png")
    name = result["id"]
    for path in (
        f"gradio_api/file={secret}",
        "gradio_api/file=/etc/passwd",
        f"file={secret}",
        "gradio_api/file=https://example.org/",
        "gradio_api/proxy=https://example.org/",
        f"images/{name}/job.json",
        f"images/{name}/..%2f..%2fclear.png",
        f"images/{name}/clear/../job.json",
        f"images/{name}/clear/99/0_0.jpg",
        f"images/..%2f{folder.parent.name}/{name}",
        "viewer/..%2fstore.py",
        "viewer/page.py",
        f"visitors/{folder.parent.name}/{name}/clear.png",
        "gradio_api/run-history/buckets",
    ):
        assert http.get(path).status_code in (404, 422), path
    assert http.post("gradio_api/upload", files={"files": b"x"}).status_code == 404


def test_uploads_are_bounded_and_enlarged(app_server, tmp_path):
    client, http = connect(app_server)
    assert "not an image" in http.post("uploads", content=b"%!PS-Adobe").json()["error"]
    # A decompression bomb: small as a file, 100 million pixels.
    Image.new("1", (10_000, 10_000)).save(tmp_path / "bomb.png")
    answer = http.post("uploads", content=(tmp_path / "bomb.png").read_bytes())
    assert answer.status_code == 400
    assert "at most 64 million" in answer.json()["error"]
    answer = http.post("uploads", content=b"\x89PNG" + bytes(65 * 2**20))
    assert "more than 64 MiB" in answer.json()["error"]

    Image.new("RGBA", (128, 128), (200, 30, 30, 128)).save(tmp_path / "a.png")
    told = http.post("uploads", content=(tmp_path / "a.png").read_bytes()).json()
    assert (told["width"], told["height"]) == (128, 128)
    result = client.predict("a house", **SMALL, image=told["name"], api_name="/generate")
    assert result["state"] == "done"
    stranger, _ = connect(app_server)
    with pytest.raises(AppError, match="uploaded image is gone"):
        stranger.predict("a house", **SMALL, image=told["name"], api_name="/generate")


def test_who_has_no_cookie_gets_one_that_scripts_cannot_read(app_server):
    answer = httpx.get(app_server.url, timeout=120)
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Lax" in cookie
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert (
        "set-cookie" not in httpx.get(app_server.url, cookies=answer.cookies, timeout=120).headers
    )


def test_auth_keeps_others_out(tmp_path):
    with AppServer(tmp_path / "out", "--auth", "ann:secret") as server:
        assert httpx.get(f"{server.url}config", timeout=120).status_code == 401
        with pytest.raises(Exception, match="credentials were not provided"):
            Client(server.url, verbose=False)
        client = Client(server.url, auth=("ann", "secret"), verbose=False)
        assert client.predict(api_name="/history") == []


class Visitor(threading.Thread):
    """Asks for images until the time is over; cancels some, goes away from some."""

    def __init__(self, server, seed, end):
        super().__init__()
        self.server, self.end, self.random = server, end, random.Random(seed)
        self.accepted, self.refused, self.unexpected = [], 0, []
        self.client, self.http = connect(server)

    def run(self):
        while time.monotonic() < self.end:
            try:
                self.once()
            except AppError as error:
                if "queue is full" not in str(error) and "in the queue" not in str(error):
                    self.unexpected.append(repr(error))
                self.refused += 1
                time.sleep(0.2)
            except Exception as error:
                self.unexpected.append(repr(error))

    def once(self):
        way = self.random.choice(["follow", "cancel", "leave", "leave"])
        settings = SMALL | {"seed": self.random.randrange(1000)}
        if way == "leave":
            # A follower that goes away in the middle of the stream.
            job = self.client.submit("a red house", **settings, api_name="/generate")
            end = time.monotonic() + 60
            while not job.outputs() and not job.done() and time.monotonic() < end:
                time.sleep(0.05)
            if job.outputs():
                self.accepted.append(job.outputs()[0]["id"])
                job.cancel()
            elif job.exception() is not None:
                raise job.exception()
            return
        found = self.client.predict("a red house", **settings, api_name="/submit")
        self.accepted.append(found["id"])
        if way == "cancel":
            time.sleep(self.random.random())
            self.client.predict(found["id"], api_name="/cancel")


def test_eight_clients_with_cancels_and_disconnects_lose_nothing(tmp_path):
    with AppServer(tmp_path / "out", "--queue-size", "6") as server:
        client, _ = connect(server)
        for _ in range(2):
            client.predict("a red house", **SMALL, api_name="/generate")
        before = server.memory_mb()
        end = time.monotonic() + LOAD_SECONDS
        visitors = [Visitor(server, seed, end) for seed in range(8)]
        for visitor in visitors:
            visitor.start()
        for visitor in visitors:
            visitor.join(timeout=LOAD_SECONDS + 300)
            assert not visitor.is_alive()
        assert [visitor.unexpected for visitor in visitors] == [[]] * 8
        states = {}
        for visitor in visitors:
            for job in visitor.accepted:
                last = time.monotonic() + 300
                while True:
                    state = visitor.client.predict(job, api_name="/status")["state"]
                    if state in ENDED or time.monotonic() > last:
                        break
                    time.sleep(0.5)
                states[job] = state
        assert len(states) >= 8
        assert set(states.values()) <= set(ENDED), states
        assert "failed" not in states.values()
        assert {"done", "cancelled"} <= set(states.values())
        records = [
            json.loads(path.read_text()) for path in server.out.glob("visitors/*/*/job.json")
        ]
        assert set(states) <= {record["id"] for record in records}
        assert {record["state"] for record in records} <= set(ENDED)
        after = server.memory_mb()
        print(f"{len(states)} jobs, memory {before:.0f} -> {after:.0f} MiB")
        assert after < before + 150
        assert httpx.get(server.url, timeout=120).status_code == 200
        result = client.predict("a red house", **SMALL, api_name="/generate")
        assert result["state"] == "done"
