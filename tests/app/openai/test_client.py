"""The API through OpenAI's own client, over HTTP; images are grey, as no model is needed here."""

import base64
import io
import os
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from support.app_thread import GreyRunner, serving
from support.packages import need
from support.slow import slow

from clear_dit.app import reception
from clear_dit.app.openai import links
from clear_dit.app.settings import MAX_IMAGES, MAX_UPLOAD_BYTES
from clear_dit.app.store import Store

need("openai")

import openai  # noqa: E402
from openai import OpenAI  # noqa: E402
from openai.types import ImageGenCompletedEvent, ImageGenPartialImageEvent  # noqa: E402

pytestmark = slow
KEY = "a-key-of-24-characters!!"
SMALL = {"prompt": "a house", "size": "256x256"}


@pytest.fixture(scope="module")
def runner():
    return GreyRunner()


@pytest.fixture(scope="module")
def served(runner, tmp_path_factory):
    """The URL, the queue and the folder of a server with a key."""
    folder = tmp_path_factory.mktemp("served")
    with serving(folder, runner, keys=(KEY,), queue_size=2) as (url, jobs):
        yield url, jobs, folder


@pytest.fixture
def client(served, runner):
    runner.go.set()
    with OpenAI(base_url=f"{served[0]}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def opened(b64):
    return Image.open(io.BytesIO(base64.b64decode(b64)))


def png(width=256, height=256):
    file = io.BytesIO()
    Image.new("RGB", (width, height), (40, 90, 200)).save(file, "PNG")
    file.seek(0)
    return file


def files(served):
    """Those of images and uploads on the server's disk, and the folders of who asked."""
    # Unlike a glob it does not mind folders that go meanwhile.
    top, found = os.path.join(served[2], "visitors"), set()
    for folder, folders, names in os.walk(top):
        found |= {os.path.join(folder, name) for name in names}
        found |= {os.path.join(folder, name) for name in folders if folder == top}
    return found


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def metrics(url):
    """The value of every sample, by name and labels; 0 of what is not there."""
    answer = httpx.get(f"{url}/metrics", headers={"authorization": f"Bearer {KEY}"})
    families = text_string_to_metric_families(answer.text)
    return Counter(
        {
            (one.name, *sorted(one.labels.values())): one.value
            for family in families
            for one in family.samples
        }
    )


def test_models(client):
    assert [one.id for one in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").owned_by == "clear-dit"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("dall-e-3")


def test_images_with_seeds_and_nothing_is_left(client, served):
    before = files(served)
    found = client.images.generate(**SMALL, model="demo", n=2, extra_body={"seed": 7})
    assert [one.seed for one in found.data] == [7, 8]
    assert (found.size, found.output_format, found.background) == ("256x256", "png", "opaque")
    assert {opened(one.b64_json).size for one in found.data} == {(256, 256)}
    until(lambda: files(served) == before)


@pytest.mark.parametrize(("kind", "format"), [("jpeg", "JPEG"), ("webp", "WEBP"), ("png", "PNG")])
def test_formats(client, kind, format):
    found = client.images.generate(**SMALL, output_format=kind)
    assert opened(found.data[0].b64_json).format == format


def test_a_url_is_fetched_without_the_key_for_an_hour(client):
    found = client.images.generate(**SMALL, response_format="url", n=2, output_format="jpeg")
    first, second = (one.url for one in found.data)
    assert first != second
    answer = httpx.get(first)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/jpeg")
    assert Image.open(io.BytesIO(answer.content)).size == (256, 256)
    assert answer.headers["cross-origin-resource-policy"] == "cross-origin"
    for other in (first[:-5] + "B.jpg", first[:-3] + "png", first.replace("files/", "files/../")):
        assert httpx.get(other).status_code in (401, 404), other
    assert links.KEEP_SECONDS == 3600


def test_an_old_url_holds_no_longer_and_its_image_is_gone(client, served, monkeypatch):
    before = files(served)
    monkeypatch.setattr(links, "KEEP_SECONDS", 5.0)
    (one,) = client.images.generate(**SMALL, response_format="url").data
    assert httpx.get(one.url).status_code == 200
    until(lambda: httpx.get(one.url).status_code == 404)
    client.images.generate(**SMALL)
    until(lambda: files(served) == before)


def test_events_come_with_previews_and_then_the_image(client):
    with client.images.generate(
        **SMALL, stream=True, partial_images=2, extra_body={"steps": 8}
    ) as stream:
        events = list(stream)
    *partial, last = events
    assert [one.partial_image_index for one in partial] == list(range(len(partial)))
    assert len(partial) <= 2
    assert last.type == "image_generation.completed"
    assert opened(last.b64_json).size == (256, 256)
    ImageGenCompletedEvent.model_validate(last.to_dict())


def test_previews_come_while_it_is_made(client, runner):
    runner.go.clear()
    with client.images.generate(
        **SMALL, stream=True, partial_images=1, extra_body={"steps": 8}
    ) as stream:
        first = next(iter(stream))
        assert first.type == "image_generation.partial_image"
        ImageGenPartialImageEvent.model_validate(first.to_dict())
        assert opened(first.b64_json).format == "JPEG"
        runner.go.set()
        assert [one.type for one in stream] == ["image_generation.completed"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_image_is_edited_at_its_size(client, served, stream):
    before, more = files(served), {"stream": True} if stream else {}
    found = client.images.edit(image=png(512, 256), prompt="a barn", model="demo", **more)
    image = list(found)[-1] if stream else found.data[0]
    assert opened(image.b64_json).size == (720, 352)
    until(lambda: files(served) == before)


@pytest.mark.parametrize("way", ["answer", "events"])
def test_who_goes_away_stops_the_image(client, served, runner, way):
    url, jobs, _ = served
    cancelled = ("clear_dit_jobs_total", "cancelled", "demo")
    before = metrics(url)[cancelled]
    runner.go.clear()
    if way == "answer":
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=1).images.generate(**SMALL, n=2)
    else:
        stream = client.images.generate(**SMALL, stream=True, partial_images=1)
        next(iter(stream))
        stream.close()
    until(lambda: metrics(url)[cancelled] - before == (2 if way == "answer" else 1))
    until(lambda: jobs.running == jobs.waiting == 0)


def test_a_full_queue_is_429_and_says_when_to_come_again(client, runner):
    runner.go.clear()
    streams = [client.images.generate(**SMALL, stream=True) for _ in range(3)]
    with pytest.raises(openai.RateLimitError) as refused:
        client.images.generate(**SMALL)
    assert int(refused.value.response.headers["retry-after"]) >= 1
    assert refused.value.code == "rate_limit_exceeded"
    runner.go.set()
    assert [list(stream)[-1].type for stream in streams] == ["image_generation.completed"] * 3
    assert client.images.generate(**SMALL).data


def test_a_failure_is_told_and_not_tried_again(client, served):
    failed = ("clear_dit_jobs_total", "demo", "failed")
    before = metrics(served[0])[failed]
    with pytest.raises(openai.InternalServerError, match="ask for fewer pixels"):
        client.with_options(max_retries=2).images.generate(prompt="memory", size="256x256")
    assert metrics(served[0])[failed] - before == 1
    with (
        client.images.generate(prompt="memory", size="256x256", stream=True) as stream,
        pytest.raises(openai.APIError, match="ask for fewer pixels"),
    ):
        list(stream)


BAD = {
    "a wrong size": ({"size": "100x100"}, "size", "multiple of 16"),
    "no size": ({"size": "large"}, "size", "pattern"),
    "too large": ({"size": "8192x8192"}, "size", "at most 262,144"),
    "too many": ({"n": MAX_IMAGES + 1}, "n", "less than or equal"),
    "no image": ({"n": 0}, "n", "greater than or equal"),
    "a blank prompt": ({"prompt": " "}, "prompt", "Enter a prompt"),
    "a long prompt": ({"prompt": "a" * 2001}, "prompt", "2000"),
    "a parameter it has not": ({"style": "vivid"}, "style", "no parameter"),
    "what it cannot do": ({"background": "transparent"}, "background", "opaque"),
    "a quality": ({"quality": "hd"}, "quality", "standard"),
    "steps": ({"extra_body": {"steps": 1000}}, "steps", "100"),
    "text for a number": ({"extra_body": {"seed": "5"}}, "seed", "integer"),
    "a LoRA": ({"extra_body": {"lora": "../x"}}, "lora", "none here"),
    "a URL in events": ({"stream": True, "response_format": "url"}, "response_format", "stream"),
    "previews without events": ({"partial_images": 2}, "partial_images", "stream"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_refused_by_its_parameter(client, name):
    more, param, words = BAD[name]
    with pytest.raises(openai.BadRequestError, match=words) as refused:
        client.images.generate(**(SMALL | more))
    assert refused.value.param == param
    assert refused.value.type == "invalid_request_error"
    assert "\n" not in refused.value.body["message"]


def test_an_unknown_model(client):
    with pytest.raises(openai.NotFoundError, match="there are demo") as refused:
        client.images.generate(**SMALL, model="gpt-image-1")
    assert refused.value.code == "model_not_found"


@pytest.mark.parametrize("key", ["wrong-key-of-24-character", "x"])
def test_a_wrong_key(served, key):
    with (
        OpenAI(base_url=f"{served[0]}/v1", api_key=key, max_retries=0) as client,
        pytest.raises(openai.AuthenticationError, match="Bearer KEY"),
    ):
        client.images.generate(**SMALL)


EDITS = {
    "no image": ({"image": io.BytesIO(b"not one")}, "not an image"),
    "two": ({"image": [png(), png()]}, "one file, got 2"),
    "a mask": ({"image": png(), "mask": png()}, "mask"),
    "another shape": ({"image": png(), "size": "256x512"}, "aspect"),
    "too small": ({"image": png(32, 32)}, "at least 64"),
    "a strength": ({"image": png(), "extra_body": {"strength": 3}}, "less than or equal to 1"),
    "large": ({"image": io.BytesIO(b"x" * (MAX_UPLOAD_BYTES + 2**20))}, "64 MiB"),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_bad_edit_is_refused_and_leaves_nothing(client, served, name):
    before, (more, words) = files(served), EDITS[name]
    with pytest.raises(openai.APIStatusError, match=words) as refused:
        client.images.edit(**({"prompt": "a barn"} | more))
    assert refused.value.status_code == (413 if name == "large" else 400)
    assert files(served) == before


def test_forms_that_are_none(served):
    url = f"{served[0]}/v1/images/edits"
    key = {"authorization": f"Bearer {KEY}"}
    form = key | {"content-type": "multipart/form-data; boundary=x"}
    for headers, content, status in (
        (key | {"content-type": "application/json"}, b"{}", 415),
        (key | {"content-type": "multipart/form-data"}, b"", 400),
        (form, b"--y\r\n", 400),
        (form, b"--x\r\nContent-Disposition: form-data\r\n\r\nA\r\n--x--\r\n", 400),
        (form, b"--x\r\nContent-Disposition: form-data; name=a\r\n\r\n" + b"a" * 10**6, 400),
        (form, b"--x--\r\n", 400),
        (form, b"", 400),
    ):
        answer = httpx.post(url, headers=headers, content=content)
        assert (answer.status_code, content[:60]) == (status, content[:60])
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("name", "file"), [(rb"image", rb"\\ud800.png"), (rb"\\ud800", rb"a.png"), (rb"\\ud800", None)]
)
def test_halves_of_characters_in_a_form_are_refused(served, name, file):
    head = b'--x\r\nContent-Disposition: form-data; name="' + name + b'"'
    head += b"" if file is None else b'; filename="' + file + b'"'
    form = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n' + head
    form += b"\r\n\r\n" + png().getvalue() + b"\r\n--x--\r\n"
    kind = "Multipart/form-data; boundary=x; charset=unicode_escape"
    answer = httpx.post(
        f"{served[0]}/v1/images/edits",
        headers={"authorization": f"Bearer {KEY}", "content-type": kind},
        content=form,
    )
    assert answer.status_code == 400, answer.text
    assert "UTF-8" in answer.json()["error"]["message"]


def test_an_error_of_the_server_is_told_as_all_others(client, served, monkeypatch):
    def full(*args, **more):
        raise OSError(28, "no place in /a/secret/path")

    before = files(served)
    monkeypatch.setattr(Store, "write", full)
    with pytest.raises(openai.InternalServerError, match="Something went wrong") as failed:
        client.images.generate(**SMALL)
    assert failed.value.type == "server_error"
    assert "secret" not in str(failed.value)
    monkeypatch.undo()
    assert files(served) == before
    assert client.images.generate(**SMALL).data


def test_who_waits_for_a_conversion_keeps_nobody_else_waiting(tmp_path, runner, monkeypatch):
    """More than there are threads for requests."""
    held = threading.Event()
    monkeypatch.setattr(reception, "converted", lambda path, *more: held.wait(60) and path)
    count, body = 45, SMALL | {"output_format": "jpeg", "steps": 1}

    def ask(url):
        while True:
            answer = httpx.post(f"{url}/v1/images/generations", json=body, timeout=90)
            if answer.status_code != 429:
                return answer.status_code
            time.sleep(0.1)

    with (
        serving(tmp_path, runner, queue_size=count) as (url, _),
        ThreadPoolExecutor(count) as pool,
    ):
        done = ("clear_dit_jobs_total", "demo", "done")
        asked = [pool.submit(ask, url) for _ in range(count)]
        try:
            until(lambda: metrics(url)[done] == count)
            time.sleep(1)  # for all of them to have seen that theirs is there
            assert httpx.get(f"{url}/health", timeout=5).status_code == 200
            assert httpx.get(f"{url}/v1/models", timeout=5).status_code == 200
        finally:
            held.set()
        assert {one.result() for one in asked} == {200}


def test_metrics_tell_what_happened(client, served):
    before = metrics(served[0])
    client.images.generate(**SMALL, n=2)
    with pytest.raises(openai.BadRequestError):
        client.images.generate(prompt="a", size="16x17")
    found = metrics(served[0])
    assert found["clear_dit_jobs_waiting",] == found["clear_dit_jobs_running",] == 0
    assert found["process_resident_memory_bytes",] > 2**27
    found.subtract(before)
    assert found["clear_dit_jobs_total", "demo", "done"] == 2
    assert found["clear_dit_pixels_total", "demo"] == 2 * 256 * 256
    assert found["clear_dit_image_seconds_sum", "decode", "demo"] == pytest.approx(0.2)
    assert found["clear_dit_image_seconds_count", "demo", "total"] == 2
    assert found["clear_dit_requests_total", "/v1/images/generations", "200"] == 1
    assert found["clear_dit_requests_total", "/v1/images/generations", "400"] == 1


def test_health_is_that_of_the_queue(tmp_path, runner):
    with serving(tmp_path, runner) as (url, jobs):
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}
        jobs.stop()
        answer = httpx.get(f"{url}/health")
        assert (answer.status_code, answer.json()) == (503, {"status": "stopping"})
        with (
            OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client,
            pytest.raises(openai.RateLimitError, match="being stopped"),
        ):
            client.images.generate(**SMALL)
