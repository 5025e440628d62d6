"""The server without a browser: its API, what it does not serve, and many clients at once."""

import io
import json
import os
import random
import re
import shlex
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image
from support.app_server import ROOT, AppServer
from support.slow import slow
from support.threads import pixels_of

from clear_dit.app.caller import new_secret
from clear_dit.app.store import ENDED
from clear_dit.generation.image_output import read_settings

pytestmark = slow
# The long version: CLEAR_DIT_LOAD_SECONDS=60 CLEAR_DIT_LOAD_CLIENTS=40.
LOAD_SECONDS = float(os.environ.get("CLEAR_DIT_LOAD_SECONDS", "15"))
CLIENTS = int(os.environ.get("CLEAR_DIT_LOAD_CLIENTS", "8"))
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
        httpx_kwargs={"cookies": {server.cookie: secret}, "timeout": 120},
        verbose=False,
        download_files=False,
    )
    http = httpx.Client(base_url=server.url, cookies={server.cookie: secret}, timeout=120)
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
        "static/..%2fstore.py",
        "static/page.py",
        f"visitors/{folder.parent.name}/{name}/clear.png",
        "gradio_api/run-history/buckets",
    ):
        assert http.get(path).status_code in (404, 422), path
    assert http.post("gradio_api/upload", files={"files": b"x"}).status_code == 404


def test_an_upload_is_enlarged_and_is_nobody_elses(app_server, tmp_path):
    client, http = connect(app_server)
    Image.new("RGBA", (128, 128), (200, 30, 30, 128)).save(tmp_path / "a.png")
    told = http.post("uploads", content=(tmp_path / "a.png").read_bytes()).json()
    assert (told["width"], told["height"], told["settings"]) == (128, 128, None)
    assert http.get(f"uploads/{told['name']}.jpg").headers["content-type"] == "image/jpeg"
    result = client.predict("a house", **SMALL, image=told["name"], api_name="/generate")
    assert result["state"] == "done"
    stranger, other = connect(app_server)
    assert other.get(f"uploads/{told['name']}.jpg").status_code == 404
    with pytest.raises(AppError, match="image to enlarge is gone"):
        stranger.predict("a house", **SMALL, image=told["name"], api_name="/generate")


def test_other_formats_hold_the_image_and_its_settings(done, tmp_path):
    _, http, result = done
    pixels = {}
    for kind, name in (("png", "PNG"), ("tif", "TIFF"), ("jpg", "JPEG"), ("webp", "WEBP")):
        answer = http.get(f"images/{result['id']}/clear.{kind}")
        assert answer.status_code == 200
        assert re.search(rf"a-red-house-\d+-\w+\.{kind}", answer.headers["content-disposition"])
        path = tmp_path / f"a.{kind}"
        path.write_bytes(answer.content)
        settings = read_settings(path)
        assert settings["prompt"] == "a red house"
        assert "/" not in json.dumps(settings["weights"])
        with Image.open(path) as image:
            assert (image.format, image.size) == (name, (256, 256))
            pixels[kind] = np.asarray(image.convert("RGB")).astype(int)
    assert (pixels["png"] == pixels["tif"]).all()
    for kind in ("jpg", "webp"):
        assert np.abs(pixels["png"] - pixels[kind]).mean() < 3
    assert http.get(f"images/{result['id']}/clear.exe").status_code == 404


def test_all_images_are_in_one_archive(done):
    _, http, result = done
    answer = http.get("images.zip")
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert archive.testzip() is None
        sizes = sorted(one.file_size for one in archive.infolist())
    assert sizes == sorted(one["bytes"] for one in result["images"])


def test_settings_come_back_from_an_image(done):
    _, http, result = done
    image = http.get(f"images/{result['id']}/clear.png").content
    found = http.post("uploads", content=image).json()["settings"]
    for name in ("prompt", "width", "height", "steps", "seed", "radius", "guidance", "model"):
        assert found[name] == result["entry"][name], name
    again = http.post(f"api/jobs/{result['id']}/clear/upload").json()
    assert (again["width"], again["settings"]["prompt"]) == (256, "a red house")


def test_the_command_that_is_told_makes_the_image(done, tmp_path):
    _, http, result = done
    words = shlex.split(result["command"])
    assert words[:2] == ["clear-dit", "generate"]
    out = tmp_path / "again.png"
    command = [sys.executable, "-m", "clear_dit", *words[1:], "--out", str(out)]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    (tmp_path / "page.png").write_bytes(http.get(f"images/{result['id']}/clear.png").content)
    assert pixels_of(out) == pixels_of(tmp_path / "page.png")


def test_news_of_jobs_have_a_tag(done):
    _, http, _ = done
    first = http.get("api/jobs")
    assert first.json()["jobs"][0]["state"] == "done"
    again = http.get("api/jobs", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    job = first.json()["jobs"][0]["id"]
    http.put(f"api/jobs/{job}/favourite", json={"favourite": True})
    changed = http.get("api/jobs", headers={"if-none-match": first.headers["etag"]})
    assert changed.json()["jobs"][0]["favourite"] is True


def test_who_has_no_cookie_gets_one_that_scripts_cannot_read(app_server):
    answer = httpx.get(app_server.url, timeout=120)
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith(f"clear-dit-{app_server.port}=")
    assert "HttpOnly" in cookie
    assert "SameSite=Lax" in cookie
    assert (
        "set-cookie" not in httpx.get(app_server.url, cookies=answer.cookies, timeout=120).headers
    )


def test_auth_keeps_others_out(tmp_path):
    with AppServer(tmp_path / "out", "--auth", "ann:secret") as server:
        assert httpx.get(f"{server.url}config", timeout=120).status_code == 401
        with pytest.raises(Exception, match="credentials were not provided"):
            Client(server.url, verbose=False)
        with pytest.raises(Exception, match="Invalid credentials"):
            Client(server.url, auth=("ann", "wrong"), verbose=False)
        time.sleep(1)
        client = Client(server.url, auth=("ann", "secret"), verbose=False)
        assert client.predict(api_name="/history") == []
        client.close()


def test_a_taken_port_is_said_before_anything_is_loaded(app_server, tmp_path):
    command = [sys.executable, "app.py", "--port", str(app_server.port), "--out", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert re.search(rf"--port {app_server.port}: .*; \d+ is free: --port \d+", result.stderr)
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_five_large_uploads_at_once_take_half_a_gigabyte(tmp_path):
    """RGBA of 8000 x 8000 pixels, 265 kB each: one is decoded at a time."""
    file = io.BytesIO()
    Image.new("RGBA", (8000, 8000), (10, 20, 30, 128)).save(file, "PNG")
    content = file.getvalue()
    assert len(content) < 10**6
    with AppServer(tmp_path / "out") as server:
        rest = server.memory_mb()
        with ThreadPoolExecutor(5) as pool:
            sent = [
                pool.submit(httpx.post, f"{server.url}uploads", content=content, timeout=300)
                for _ in range(5)
            ]
            peak = rest
            while not all(one.done() for one in sent):
                peak = max(peak, server.memory_mb())
                time.sleep(0.01)
        statuses = [one.result().status_code for one in sent]
        print(f"uploads {statuses}, memory {rest:.0f} -> {peak:.0f} MiB")
        assert set(statuses) <= {200, 429}
        assert 200 in statuses
        assert peak < rest + 500
        kept = [path for path in server.out.rglob("uploads/*") if path.suffix != ".jpg"]
        assert len(kept) == statuses.count(200)


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
                if not re.search("queue is full|in the queue|at once", str(error)):
                    self.unexpected.append(repr(error))
                self.refused += 1
                time.sleep(0.2)
            except Exception as error:
                self.unexpected.append(repr(error))

    def attack(self):
        """Random bytes, to where programs and the page send theirs, with and without a cookie."""
        body = self.random.randbytes(self.random.randrange(2000))
        for path in ("gradio_api/queue/join", "gradio_api/call/generate", "api/jobs", "uploads"):
            cookies = {"a[b]": "1", self.server.cookie: new_secret()}
            answer = httpx.post(self.server.url + path, content=body, cookies=cookies, timeout=120)
            if answer.status_code not in (400, 429, 503):
                self.unexpected.append(f"{path}: {answer.status_code}")

    def once(self):
        way = self.random.choice(["follow", "cancel", "leave", "hostile"])
        settings = SMALL | {"seed": self.random.randrange(1000)}
        if way == "hostile":
            self.attack()
            return
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


def test_many_clients_with_cancels_and_hostile_bodies_lose_nothing(tmp_path):
    log = (tmp_path / "log").open("wb")
    with log, AppServer(tmp_path / "out", "--queue-size", "12", log=log) as server:
        client, _ = connect(server)
        for _ in range(2):
            client.predict("a red house", **SMALL, api_name="/generate")
        before = server.memory_mb()
        end = time.monotonic() + LOAD_SECONDS
        visitors = [Visitor(server, seed, end) for seed in range(CLIENTS)]
        for visitor in visitors:
            visitor.start()
        for visitor in visitors:
            visitor.join(timeout=LOAD_SECONDS + 300)
            assert not visitor.is_alive()
        assert [visitor.unexpected for visitor in visitors] == [[]] * CLIENTS
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
        assert (tmp_path / "log").stat().st_size < 10**6
        assert "Traceback" not in (tmp_path / "log").read_text()
        assert httpx.get(server.url, timeout=120).status_code == 200
        result = client.predict("a red house", **SMALL, api_name="/generate")
        assert result["state"] == "done"
