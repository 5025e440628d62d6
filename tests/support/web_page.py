"""The web page in a browser: what a person does, and what a program sees of it."""

import json
import re
from urllib.parse import urlparse

SECONDS = 240
SIZES = {"desktop": (1280, 860), "tablet": (820, 1180), "phone": (390, 844)}
SCHEMES = ("light", "dark")
ENTRY = {
    "prompt": "a violet tower in the desert",
    "negative_prompt": "",
    "model": "demo",
    "width": 256,
    "height": 256,
    "attention": "clear",
    "radius": 8,
    "down_factor": 1,
    "far": None,
    "steps": 1,
    "guidance": 1.0,
    "seed": 7,
    "image": "",
    "strength": None,
    "lora": "",
    "lora_scale": 1.0,
}
# Of Chromium, of requests that were refused or given up on purpose.
EXPECTED = "AbortError|status of 4\\d\\d"
AWAY = "|ERR_CONNECTION_REFUSED|ERR_CONNECTION_RESET|ERR_INTERNET_DISCONNECTED|ERR_FAILED"


class Visitor:
    """A browser of its own, with nothing kept from others.

    Args:
        browser: of playwright.
        server: see `AppServer`.
        size: one of `SIZES`.
        scheme: one of `SCHEMES`.
        away: whether the server is away for a while, which browsers note.
        options: of a context of playwright.
    """

    def __init__(self, browser, server, size="desktop", scheme="light", away=False, **options):
        width, height = SIZES[size]
        phone = {"has_touch": True, "is_mobile": True} if size == "phone" else {}
        self.context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, **phone | options
        )
        self.context.set_default_timeout(1000 * SECONDS)
        self._server, self._expected = server, EXPECTED + (AWAY if away else "")
        self._wrong = []

    def open(self, part="", jobs=None, setup=None):
        """A tab with the page.

        Args:
            part: of the address, after the server's own.
            jobs: what the page shows in the place of the server's, see `job`.
            setup: what the server offers otherwise than it does.
        """
        page = self.context.new_page()
        if jobs is not None:
            pretend_jobs(page, *jobs)
        if setup is not None:
            own = page.request.get(f"{self._server.url}api/setup").json()
            pretend(page, "/api/setup", own | setup)
        note = self._wrong.append
        page.on("pageerror", lambda error: note(str(error)))
        page.on("console", lambda told: note(told.text) if told.type == "error" else None)
        page.on("dialog", lambda dialog: (note(f"dialog: {dialog.message}"), dialog.dismiss()))
        own = ("", f"127.0.0.1:{self._server.port}")
        page.on(
            "request",
            lambda request: None if urlparse(request.url).netloc in own else note(request.url),
        )
        page.goto(self._server.url + part)
        page.locator("#page").wait_for()
        return page

    def close(self):
        """Nothing went wrong in its tabs, and nothing came from elsewhere."""
        self.context.close()
        wrong = [one for one in self._wrong if not re.search(self._expected, one)]
        assert not wrong, wrong


def unfold(page):
    """Let the whole form be seen, which is folded below the image on a phone."""
    if page.is_visible("#fold") and page.get_attribute("#fold", "aria-expanded") == "false":
        page.click("#fold")
    if not page.evaluate("document.querySelector('#more').open"):
        page.click("#more summary")


def enter(page, prompt="a violet tower in the desert", **fields):
    """Fill the form in; 256 x 256 pixels and one step unless told otherwise."""
    unfold(page)
    page.fill("#prompt", prompt)
    small = {"steps": 1, "width": 256, "height": 256}
    for name, value in (small | fields).items():
        page.fill(f"#f-{name}", str(value))


def generate(page, **entered):
    """Enter, and press Generate."""
    enter(page, **entered)
    page.click("#generate")


def act(page, name):
    """Press a button of the opened image, which is in a menu where there is little room."""
    button = page.locator("#opened-buttons button", has_text=name)
    if button.is_visible():
        button.click()
    else:
        page.click("#more-opened")
        page.click(f"#menu >> text={name}")


def finished(page):
    """The viewer of the opened image, when it is done."""
    page.wait_for_selector("#stage .viewer, #stage .ended")
    assert page.locator("#stage .ended").count() == 0, page.inner_text("#opened")
    return page.frame_locator("#stage .viewer")


def ask(page, method, path, body=None):
    """What a route answers to this visitor: its JSON."""
    address = page.url.split("#")[0] + path
    data = None if body is None else json.dumps(body)
    headers = {"content-type": "application/json"}
    answer = page.request.fetch(address, method=method, data=data, headers=headers)
    assert answer.ok, answer.text()
    return answer.json()


def look_at_once(page):
    """Let the page ask for its jobs now, not at its next turn."""
    page.evaluate("dispatchEvent(new Event('online'))")


def make_image(page, **entry):
    """An image of the visitor's, made without the form; its job, which the page shows."""
    body = {"entry": ENTRY | entry, "images": 1}
    job = ask(page, "POST", "api/jobs", body)["jobs"][0]
    look_at_once(page)
    card = page.locator(f".card[data-job='{job['id']}']")
    card.and_(page.locator("[data-state=done]")).wait_for()
    return ask(page, "GET", f"images/{job['id']}")


def job(number=1, **changes):
    """A job as the server tells it, done unless told otherwise."""
    state = changes.get("state", "done")
    entry = ENTRY | changes.pop("entry", {})
    image = {
        "attention": "clear",
        "width": entry["width"],
        "height": entry["height"],
        "levels": 9,
        "bytes": 90_000,
        "seconds": {"total": 1.5, "text": 0.1, "denoise": 1.0, "decode": 0.4},
        "flops": 2e12,
    }
    at_work = {
        "place": 0 if state == "running" else number,
        "waiting": number,
        "phase": "step 3 of 20",
        "fraction": 0.4 if state == "running" else 0.0,
        "seconds_left": 60.0 * number,
        "preview": None,
        "ran": 0,
    }
    told = {
        "id": f"{number:022d}",
        "state": state,
        "created": 1.8e9 - number,
        "entry": entry,
        "image_name": None,
        "error": None,
        "favourite": False,
        "command": "clear-dit generate 'a violet tower'",
        "images": [image] if state == "done" else [],
    }
    return told | (at_work if state in ("waiting", "running") else {}) | changes


def pretend(page, path, answer, status=200):
    """Let a route of the server answer this tab with JSON of a test."""
    body = json.dumps(answer)
    page.route(
        re.compile(rf"{path}(\?.*)?$"),
        lambda route: route.fulfill(status=status, body=body, content_type="application/json"),
    )


def pretend_jobs(page, *jobs):
    """Let the page show these jobs."""
    waiting = sum(one["state"] == "waiting" for one in jobs)
    pretend(page, "/api/jobs", {"jobs": list(jobs), "waiting": waiting})
