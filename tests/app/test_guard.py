"""What an attacker would send: to every route, from other sites, strange cookies and bodies."""

import asyncio
import io
import json
import threading
import time

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from support.app_routes import all_routes, connect, make_app, run
from support.slow import slow

from clear_dit.app.caller import new_secret, visitor_of
from clear_dit.app.guard import POLICY
from clear_dit.app.jobs import Jobs
from clear_dit.app.settings import MAX_BODY_BYTES

COOKIE = "clear-dit-7860"
KEY = "a-key-of-24-characters!!"
ENTRY = {"entry": {"prompt": "a house", "width": 256, "height": 256, "steps": 2}}


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    return make_app(tmp_path_factory.mktemp("app"))


@pytest.fixture(scope="module")
def locked(tmp_path_factory):
    """With accounts."""
    auth = (("ann", "secret"), ("bob", "hidden"))
    return make_app(tmp_path_factory.mktemp("locked"), auth=auth)


def ask(app, *requests, **options):
    """The answers to requests of one client, one after the other."""

    async def all_of_them():
        async with connect(app, **options) as client:
            return [
                await client.request(method, path, **({} if not more else more[0]))
                for method, path, *more in requests
            ]

    return run(all_of_them())


def png(width, height, mode="RGB"):
    file = io.BytesIO()
    Image.new(mode, (width, height)).save(file, "PNG")
    return file.getvalue()


def login(name="ann", password="secret"):
    return ("POST", "/login", {"data": {"username": name, "password": password}})


def test_the_sweep_sees_the_routes(app):
    routes = all_routes(app)
    for known in (
        ("POST", "/uploads"),
        ("GET", "/view/x"),
        ("GET", "/images/x/x.x"),
        ("GET", "/images.zip"),
        ("POST", "/api/jobs"),
        ("DELETE", "/api/jobs/x"),
        ("POST", "/gradio_api/queue/join"),
        ("GET", "/gradio_api/file=x"),
        ("GET", "/config"),
    ):
        assert known in routes


OPEN_ROUTES = ("/login", "/login/", "/v1/images/files/x.x")


@pytest.fixture(scope="module")
def keyed(tmp_path_factory):
    """Without the page: programs with the key come in."""
    folder = tmp_path_factory.mktemp("keyed")
    return make_app(folder, keys=(KEY,), page=False, max_pixels=512**2)


def test_every_route_asks_for_the_login(locked):
    routes = [one for one in all_routes(locked) if one[1] not in OPEN_ROUTES]
    others = [("GET", "/nothing"), ("POST", "/"), ("PUT", "/uploads"), ("OPTIONS", "/api/jobs")]
    assert len(routes) > 60
    for (method, path), answer in zip(
        [*routes, *others], ask(locked, *routes, *others), strict=True
    ):
        assert answer.status_code == 401, (method, path)
        if method == "HEAD":
            assert answer.content == b""
        elif path.startswith(("/v1/", "/health", "/metrics")):
            assert answer.json()["error"]["type"] == "authentication_error"
        else:
            assert answer.json() == {"error": "Log in.", "field": None}
        assert "set-cookie" not in answer.headers
    (answer,) = ask(locked, ("GET", "/", {"headers": {"accept": "text/html"}}))
    assert (answer.status_code, answer.headers["location"]) == (303, "/login")


@pytest.mark.parametrize(
    "sent", ["", "Bearer", f"Bearer {'x' * 24}", f"Basic {'x' * 24}", "Bearer \xff\xfe", None]
)
def test_every_route_asks_for_the_key(keyed, sent):
    routes = [one for one in all_routes(keyed) if one[1] not in OPEN_ROUTES]
    assert ("POST", "/v1/images/generations") in routes
    assert ("GET", "/metrics") in routes
    others = [("GET", "/"), ("GET", "/login"), ("POST", "/v1/images/files/x.png")]
    headers = [] if sent is None else [(b"authorization", sent.encode("latin-1"))]
    asked = [(*route, {"headers": headers}) for route in [*routes, *others]]
    for (method, path, _), answer in zip(asked, ask(keyed, *asked), strict=True):
        assert answer.status_code == 401, (method, path)
        assert answer.headers["www-authenticate"] == "Bearer"
        assert "set-cookie" not in answer.headers


def test_a_key_lets_in_and_a_cookie_beside_a_wrong_one_does_not(keyed, tmp_path):
    right, wrong = ({"authorization": f"Bearer {key}"} for key in (KEY, KEY[::-1]))
    found, no = ask(keyed, *[("GET", "/v1/models", {"headers": one}) for one in (right, wrong)])
    assert (found.status_code, no.status_code) == (200, 401)
    assert found.json()["data"][0]["id"] == "demo"
    both = make_app(tmp_path, keys=(KEY,), auth=(("ann", "secret"),))
    _, cookie, key, neither = ask(
        both,
        login(),
        ("GET", "/v1/models"),
        ("GET", "/v1/models", {"headers": right}),
        ("GET", "/v1/models", {"headers": wrong}),
    )
    assert [one.status_code for one in (cookie, key, neither)] == [200, 200, 401]


OUTSIDE = (
    {"host": "host.docker.internal:7860"},
    {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"},
    {"origin": "tauri://localhost"},
)


@pytest.mark.parametrize("headers", OUTSIDE)
def test_a_key_lets_in_by_any_name_and_nothing_else_does(keyed, headers):
    for key, status in ((KEY, 200), (KEY[::-1], 403), (None, 403)):
        more = {} if key is None else {"authorization": f"Bearer {key}"}
        (answer,) = ask(keyed, ("GET", "/v1/models", {"headers": headers | more}))
        assert answer.status_code == status, key


@pytest.mark.parametrize("headers", OUTSIDE)
def test_a_url_of_an_image_is_for_pages_of_other_sites_too(keyed, headers):
    (answer,) = ask(keyed, ("GET", "/v1/images/files/x.png", {"headers": headers}))
    assert answer.status_code == 404
    (answer,) = ask(keyed, ("POST", "/v1/images/files/x.png", {"headers": headers}))
    assert answer.status_code == 403


def test_who_has_a_url_of_an_image_needs_no_key(keyed):
    path = "/v1/images/files/x.png"
    assert [ask(keyed, (method, path))[0].status_code for method in ("GET", "PUT")] == [404, 401]


def test_who_is_not_logged_in_leaves_nothing(locked):
    headers = {"cookie": f"{COOKIE}={new_secret()}"}
    jobs = {"json": ENTRY, "headers": headers}
    upload = {"content": png(64, 64), "headers": headers}
    answers = ask(locked, ("POST", "/api/jobs", jobs), ("POST", "/uploads", upload))
    assert [answer.status_code for answer in answers] == [401, 401]


def test_history_belongs_to_the_account_and_ends_with_logout(locked):
    submitted, *_ = ask(locked, login(), ("POST", "/api/jobs", {"json": ENTRY}))[1:]
    job = submitted.json()["jobs"][0]["id"]
    _, elsewhere, setup = ask(locked, login(), ("GET", "/api/jobs"), ("GET", "/api/setup"))
    assert [one["id"] for one in elsewhere.json()["jobs"]] == [job]
    assert setup.json()["account"] == "ann"
    _, other, foreign = ask(
        locked, login("bob", "hidden"), ("GET", "/api/jobs"), ("GET", f"/images/{job}")
    )
    assert other.json()["jobs"] == []
    assert foreign.status_code == 404
    *_, after = ask(locked, login(), ("POST", "/logout"), ("GET", "/api/jobs"))
    assert after.status_code == 401
    ask(locked, login(), ("DELETE", f"/api/jobs/{job}"))


def test_a_logged_out_secret_is_worth_nothing(locked):
    (entered,) = ask(locked, login())
    secret = entered.cookies[COOKIE]
    headers = {"headers": {"cookie": f"{COOKIE}={secret}"}}
    before, _, after = ask(
        locked, ("GET", "/api/jobs", headers), ("POST", "/logout", headers), ("GET", "/", headers)
    )
    assert (before.status_code, after.status_code) == (200, 401)


def test_wrong_logins_slow_down_and_pages_say_so(tmp_path):
    app = make_app(tmp_path, auth=(("ann", "secret"),))
    html = {"headers": {"accept": "text/html"}}
    wrong = ("POST", "/login", {"data": {"username": "ann", "password": "<b>"}} | html)
    first, second = ask(app, wrong, wrong, address="10.0.0.9")
    assert (first.status_code, second.status_code) == (401, 429)
    assert "Name or password are wrong" in first.text
    assert "retry-after" in second.headers
    for bad in ("", "a" * 300):
        assert ask(app, login(bad, bad), address="10.0.0.8")[0].status_code in (400, 401)
    time.sleep(0.6)
    page = ask(app, ("GET", "/login"), login(), ("GET", "/"), address="10.0.0.7")
    assert [one.status_code for one in page] == [200, 200, 200]
    policy = page[0].headers["content-security-policy"]
    assert "unsafe" not in policy
    assert "<script" not in page[0].text
    assert page[1].headers["set-cookie"].endswith("HttpOnly; SameSite=Lax")


WRITES = [
    ("POST", "/api/jobs", {"json": ENTRY}),
    ("POST", "/api/estimate", {"json": ENTRY["entry"]}),
    ("POST", "/uploads", {"content": png(64, 64)}),
    ("DELETE", "/api/jobs/x", {}),
    ("PUT", "/api/jobs/x/favourite", {"json": {}}),
    ("POST", "/logout", {}),
    ("POST", "/gradio_api/queue/join", {"json": {}}),
]


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:8000"},
        {"origin": "http://127.0.0.1:7860.evil.example"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "same-site", "origin": "http://127.0.0.1:7860"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"},
        {"host": "evil.example"},
        {"host": "evil.example:7860", "origin": "http://evil.example:7860"},
        {"host": "localhost.evil.example"},
        {"host": ""},
    ],
)
def test_other_sites_write_nothing(app, headers):
    requests = [(method, path, more | {"headers": headers}) for method, path, more in WRITES]
    for request, answer in zip(requests, ask(app, *requests), strict=True):
        assert answer.status_code == 403, request


def test_its_own_page_and_programs_may(app):
    for headers in (
        {"origin": "http://127.0.0.1:7860"},
        {"sec-fetch-site": "same-origin"},
        {"sec-fetch-site": "none"},
        {"host": "localhost:9999", "origin": "http://localhost:9999"},
        {"host": "[::1]:7860"},
        {},
    ):
        request = ("POST", "/api/estimate", {"json": ENTRY["entry"], "headers": headers})
        assert ask(app, request)[0].json()["allowed"], headers
    link = {"headers": {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}}
    assert ask(app, ("GET", "/", link))[0].status_code == 200, "a link leads here"
    image = {"headers": {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}}
    assert ask(app, ("GET", "/api/jobs", image))[0].status_code == 403


def test_names_behind_a_proxy_are_its_matter(tmp_path):
    app = make_app(tmp_path, proxy=("127.0.0.1",))
    headers = {"host": "images.example", "origin": "https://images.example"}
    request = ("POST", "/api/estimate", {"json": ENTRY["entry"], "headers": headers})
    assert ask(app, request)[0].status_code == 200


@pytest.mark.parametrize(
    "others",
    [
        'prefs={"theme":"dark"}',
        "a[b]=1",
        "name=José",
        "flag",
        "=",
        ";;; ;",
        f"{COOKIE}x=1",
        f"{COOKIE}=short",
        'quoted="a; b"',
        "x" * 4000 + "=1",
    ],
)
def test_cookies_of_other_programs_are_normal(app, locked, others):
    others = others.encode("latin-1", "replace")
    secret = new_secret()
    for cookie in (others + b"; ", b""), (b"", b"; " + others):
        value = cookie[0] + f"{COOKIE}={secret}".encode() + cookie[1]
        (answer,) = ask(app, ("GET", "/api/jobs", {"headers": [(b"cookie", value)]}))
        assert answer.status_code == 200
        assert "set-cookie" not in answer.headers, "it has one that counts"
    (entered,) = ask(locked, login())
    value = others + b"; " + f"{COOKIE}={entered.cookies[COOKIE]}".encode()
    assert ask(locked, ("GET", "/", {"headers": [(b"cookie", value)]}))[0].status_code == 200


def test_every_answer_has_the_policy_and_no_leave_for_other_sites(app):
    origin = {"headers": {"origin": "http://127.0.0.1:7860"}}
    # These two answer without end.
    endless = ("/gradio_api/heartbeat/x", "/gradio_api/queue/data")
    routes = [(*route, origin) for route in all_routes(app) if route[1] not in endless]
    for (_, path, _), answer in zip(routes, ask(app, *routes), strict=True):
        if path != "/login":
            assert answer.headers["content-security-policy"] == POLICY, path
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert not [name for name in answer.headers if name.startswith("access-control")], path
    assert "unsafe" not in POLICY


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=/etc/passwd%0a",
        "/gradio_api/file%0a=/etc/passwd",
        "/gradio_api/upload%0a",
        "/%0agradio_api/upload",
        "//gradio_api/upload",
        "/gradio_api//upload",
        "/gradio_api/./upload",
        "/x/../gradio_api/upload",
        "/gradio_api/queue/join%0a/../../upload",
        "/gradio_api/proxy=https://example.org/",
        "/gradio_api/heartbeat/..%2f..%2fupload",
        "/gradio_api/vibe-edit",
        "/gradio_api/run/submit",
        "/gradio_api/component_server",
        "/monitoring",
        "/static/..%2fserver.py",
        "/static/%2e%2e/server.py",
        "/static/page.css%00.js",
        "/images/..%2f..%2fx",
        "/images/x/clear_files/0/0_0.jpg",
    ],
)
def test_what_is_not_on_the_list_is_closed(app, path):
    for method in ("GET", "POST", "PUT", "DELETE"):
        assert ask(app, (method, path))[0].status_code in (404, 405), method


HOSTILE = [
    b"",
    b"\xff\xfe\x00random",
    b"[]",
    b"5",
    b"null",
    b'{"a": NaN}',
    b'{"a": 1e999}',
    b'{"data": "\\ud800"}',
    b"[" * 100_000,
    b'{"a":' * 9_000 + b"1" + b"}" * 9_000,
    b"{" + b" " * MAX_BODY_BYTES + b"}",
]


@pytest.mark.parametrize("body", HOSTILE, ids=range(len(HOSTILE)))
def test_bodies_that_are_none_are_one_line(app, body, caplog):
    paths = (
        "/gradio_api/queue/join",
        "/gradio_api/call/generate",
        "/gradio_api/cancel",
        "/api/jobs",
        "/api/estimate",
    )
    for path, answer in zip(paths, ask(app, *[("POST", p, {"content": body}) for p in paths]),
                            strict=True):  # fmt: skip
        assert answer.status_code in (400, 413), path
        assert "\n" not in answer.text
    assert "Traceback" not in caplog.text
    assert len(caplog.records) == 0


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("status", []),
        ("status", ["a", "b"]),
        ("status", "a"),
        ("status", None),
        ("submit", ["a house\nWARNING: forged"]),
        ("history", ["x"]),
        ("nothing", []),
    ],
)
def test_calls_with_other_values_write_no_log(app, name, data, capfd, caplog):
    """Gradio wrote all that came to stderr, as often as it came, and told where objects lie."""
    number = {"submit": 0, "generate": 1, "status": 2, "cancel": 3, "history": 4}.get(name, 99)
    join = {"fn_index": number, "data": data, "session_hash": "x"}
    requests = [
        ("POST", f"/gradio_api/call/{name}", {"json": {"data": data}}),
        ("POST", "/gradio_api/queue/join", {"json": join}),
        ("POST", "/gradio_api/queue/join", {"json": join | {"fn_index": str(number)}}),
    ]
    for answer in ask(app, *requests):
        assert answer.status_code == 400
        assert "0x" not in answer.text
    assert capfd.readouterr().err == ""
    assert not caplog.records


@pytest.mark.filterwarnings("ignore")  # pandas, which Gradio imports as it starts
@pytest.mark.parametrize("job", [5, None, ["a"], {"path": "/etc/passwd"}, "x", "../../x"])
def test_jobs_by_strange_names_are_not_there(app, job, capfd, monkeypatch):
    monkeypatch.setattr(Jobs, "stop", lambda self: None)  # it was not started

    async def call():
        async with connect(app) as client:
            sent = await client.post("/gradio_api/call/status", json={"data": [job]})
            return await client.get(f"/gradio_api/call/status/{sent.json()['event_id']}")

    async def served():
        inner = app._app._app
        async with inner.router.lifespan_context(inner):
            return await asyncio.wait_for(call(), 30)

    assert "There is no such image of yours" in run(served()).text
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"entry": None},
        {"entry": {"prompt": "a", "width": [1]}},
        {"entry": {"prompt": {"a": 1}}},
        {"entry": {"prompt": "a", "image": "../../x"}},
        {"entry": {"prompt": "a", "image": ["x"]}},
        {"entry": {"prompt": "a", "lora": "/etc/passwd"}},
        {"entry": {"prompt": "a", "model": "/etc"}},
        {"entry": {"prompt": "a"}, "images": "many"},
        {"entry": {"prompt": "a"}, "images": 10**9},
        {"entry": {"prompt": "a", "width": 10**400}},
    ],
)
def test_entries_that_are_none_are_refused_in_a_line(app, given):
    (answer,) = ask(app, ("POST", "/api/jobs", {"content": json.dumps(given)}))
    assert answer.status_code == 400
    assert len(answer.json()["error"]) < 300
    assert "Error" not in answer.json()["error"]


def test_clients_without_cookies_get_no_more_than_one_with(tmp_path):
    """Random cookies, none, and one: the address counts."""
    app = make_app(tmp_path, queue_size=16, host="0.0.0.0")

    def send(headers, address):
        request = ("POST", "/api/jobs", {"json": ENTRY, "headers": headers})
        return ask(app, request, address=address)[0].status_code

    crowd = [send({"cookie": f"{COOKIE}={new_secret()}"}, "10.0.0.1") for _ in range(20)]
    assert crowd.count(200) == 8
    assert set(crowd) == {200, 429}
    assert send({}, "10.0.0.1") == 429
    assert [send({}, "10.0.0.2") for _ in range(9)].count(200) == 8
    last = [send({}, "2001:db8::1") for _ in range(2)]
    assert last == [200, 429], "one would run at once, 16 wait"


def test_one_address_keeps_few_uploads_whatever_its_cookies(tmp_path, monkeypatch):
    monkeypatch.setattr("clear_dit.app.reception.MAX_UPLOADS_OF_ADDRESS", 3)
    app = make_app(tmp_path)

    def send(address):
        (answer,) = ask(app, ("POST", "/uploads", {"content": png(8, 8)}), address=address)
        assert answer.status_code == 200
        return answer.json()["name"]

    other = send("10.0.0.2")
    sent = [send("10.0.0.1") for _ in range(5)]
    kept = {path.name for path in tmp_path.glob("visitors/*/uploads/*") if path.suffix != ".jpg"}
    assert kept == {other, *sent[2:]}


def test_conversions_that_wait_hold_up_nobody(tmp_path, monkeypatch):
    """Sixty, while a large upload was decoded, stopped all answers for 16 seconds."""
    app, held, go = make_app(tmp_path), threading.Semaphore(0), threading.Event()

    def converted(path, kind, decoding):
        held.release()
        assert go.wait(60)
        return path

    monkeypatch.setattr("clear_dit.app.reception.converted", converted)
    secret = new_secret()
    folder = tmp_path / "visitors" / visitor_of(secret) / ("x" * 22)
    folder.mkdir(parents=True)
    (folder / "clear.png").write_bytes(png(8, 8))
    record = {
        "id": folder.name,
        "state": "done",
        "created": 1,
        "entry": ENTRY["entry"] | {"seed": 1},
    }
    (folder / "job.json").write_text(json.dumps(record))

    async def send():
        headers = {"cookie": f"{COOKIE}={secret}"}
        async with connect(app, headers=headers) as client:
            image = f"/images/{folder.name}/clear.webp"
            waiting = [asyncio.create_task(client.get(image)) for _ in range(60)]
            await asyncio.to_thread(held.acquire)
            setup = await asyncio.wait_for(client.get("/api/setup"), 30)
            async with asyncio.timeout(30):
                while sum(one.done() for one in waiting) < 52:
                    await asyncio.sleep(0.01)
            go.set()
            return setup, await asyncio.gather(*waiting)

    setup, waited = run(send())
    assert setup.status_code == 200
    codes = [one.status_code for one in waited]
    assert (codes.count(200), codes.count(429)) == (8, 52)


@slow
def test_one_address_has_few_uploads_at_once(app):
    """While four are being sent others are refused, and a slow one holds up nobody."""

    async def send():
        started, go = asyncio.Event(), asyncio.Event()

        async def slowly():
            yield png(64, 64)[:20]
            started.set()
            await go.wait()

        async with connect(app, address="10.0.0.5") as client:
            waiting = [
                asyncio.create_task(client.post("/uploads", content=slowly())) for _ in range(4)
            ]
            await asyncio.wait_for(started.wait(), 60)
            await asyncio.sleep(1)
            refused = await client.post("/uploads", content=png(64, 64))
            async with connect(app, address="10.0.0.6") as other:
                taken = await other.post("/uploads", content=png(64, 64))
            go.set()
            cut = await asyncio.gather(*waiting)
            again = await client.post("/uploads", content=png(64, 64))
            return refused, taken, cut, again

    refused, taken, cut, again = run(send())
    assert (refused.status_code, taken.status_code, again.status_code) == (429, 200, 200)
    assert [one.status_code for one in cut] == [400] * 4


@pytest.mark.parametrize(
    "settings",
    [
        '{"prompt": "a", "guidance": NaN}',
        '{"prompt": "a", "guidance": 1e999}',
        '{"prompt": "\\ud800"}',
        '{"prompt": "a", "seed": ' + "9" * 5000 + "}",
        '{"prompt": ' + "[" * 50_000,
        '{"prompt": [' + "[]," * 100_000 + "[]]}",
        "[]",
    ],
    ids=range(7),
)
def test_hostile_settings_in_an_upload_are_none(app, settings, monkeypatch):
    """A text of 24 MB took 0.5 GB, and nobody else was answered for nine seconds."""
    loads, read = json.loads, []
    monkeypatch.setattr(json, "loads", lambda text, **how: read.append(text) or loads(text, **how))
    info = PngInfo()
    info.add_itxt("clear_dit", settings)
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG", pnginfo=info)
    (answer,) = ask(app, ("POST", "/uploads", {"content": file.getvalue()}))
    assert (answer.status_code, answer.json()["settings"]) == (200, None)
    assert max(map(len, read), default=0) <= MAX_BODY_BYTES


def test_a_refused_upload_leaves_nothing(tmp_path):
    app = make_app(tmp_path)
    for content in (b"", b"%!PS-Adobe", png(64, 64)[:-30]):
        (answer,) = ask(app, ("POST", "/uploads", {"content": content}))
        assert answer.status_code == 400
    (answer,) = ask(app, ("POST", "/uploads", {"headers": {"content-length": str(2**40)}}))
    assert answer.status_code == 413
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
