"""The page as a person uses it: chromium, the server in a process of its own, the demo pipeline."""

import re
from urllib.parse import urlparse

import pytest
from support.slow import slow

SECONDS = 240

pytestmark = slow


@pytest.fixture
def page(browser, app_server):
    """A new visitor's page, on which nothing goes wrong and nothing comes from elsewhere."""
    yield from open_page(browser, app_server)


def open_page(browser, server, restarts=False):
    """restarts: whether the server may be away for a while, which a page that asks it notes."""
    context = browser.new_context(viewport={"width": 1280, "height": 860})
    page = context.new_page()
    wrong = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda told: wrong.append(told.text) if told.type == "error" else None)
    page.on(
        "request",
        lambda request: (
            wrong.append(request.url)
            if urlparse(request.url).netloc not in ("", f"127.0.0.1:{server.port}")
            else None
        ),
    )
    page.set_default_timeout(1000 * SECONDS)
    page.goto(server.url)
    page.wait_for_selector("#generate")
    yield page
    context.close()
    # A page that is left drops the question it has just asked.
    expected = "AbortError|Connection errored out"
    if restarts:
        expected += "|ERR_CONNECTION_REFUSED|Failed to fetch|timed out"
    assert [one for one in wrong if not re.search(expected, one)] == []


def enter(page, prompt, steps=2, size=256):
    page.fill("#prompt textarea", prompt)
    page.fill("#steps input", str(steps))
    page.fill("#width input", str(size))
    page.fill("#height input", str(size))
    page.click("#generate")


def finished(page):
    page.wait_for_selector(".status.done, .status.failed")
    assert page.locator(".status.failed").count() == 0, page.inner_text("#status")
    return page.frame_locator("iframe.viewer")


def fraction(page):
    return float(page.get_attribute("[role=progressbar]", "aria-valuenow"))


def test_generate_with_progress_and_preview_then_cancel_and_generate_again(page):
    enter(page, "a red house by the sea", steps=40, size=320)
    page.wait_for_selector("img.preview")
    first = fraction(page)
    page.wait_for_function(
        "before => !document.querySelector('[role=progressbar]') || "
        "+document.querySelector('[role=progressbar]').ariaValueNow > before",
        arg=first,
    )
    viewer = finished(page)
    viewer.locator("canvas").first.wait_for()
    assert "CLEAR" in page.inner_text("#status")
    with page.expect_download() as download:
        page.click("#status a")
    assert download.value.path().read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    enter(page, "a red house by the sea", steps=100, size=512)
    page.wait_for_selector(".status.running")
    page.wait_for_function("document.querySelector('#status').innerText.includes('step')")
    page.click("#cancel")
    page.wait_for_selector(".status.cancelled")
    assert page.locator(".card").count() == 1, "a cancelled image is not kept"
    enter(page, "a blue house in the hills at night")
    finished(page)
    page.wait_for_function("document.querySelectorAll('.card:not(.pending)').length == 2")


def test_compare_shows_both_with_a_slider_seconds_and_flops(page):
    page.click("#attention >> text=Both")
    enter(page, "a green tower by the sea")
    viewer = finished(page)
    told = page.inner_text("#status")
    assert re.search(r"CLEAR.*s.*FLOP", told)
    assert re.search(r"Full attention.*s.*FLOP", told)
    slider = viewer.locator("#slider")
    slider.wait_for()
    over = viewer.locator(".pane.over")
    middle = over.evaluate("pane => pane.style.clipPath")
    slider.focus()
    slider.press("Home")
    left = over.evaluate("pane => pane.style.clipPath")
    assert left != middle
    assert float(re.findall(r"[\d.]+px\)", left)[0][:-3]) < 20, "the right image is all shown"


def test_zoom_into_a_large_image_by_tiles(browser, app_server):
    opened = open_page(browser, app_server)
    page = next(opened)
    tiles = []
    page.on("response", lambda one: tiles.append(one.url) if ".jpg" in one.url else None)
    enter(page, "an orange moon over the sea", steps=1, size=2048)
    viewer = finished(page)
    viewer.locator("canvas").first.wait_for()
    page.wait_for_function("document.querySelector('iframe.viewer').contentWindow.viewers")
    frame = next(frame for frame in page.frames if "/view/" in frame.url)
    frame.wait_for_function("viewers[0].world.getItemAt(0)?.getFullyLoaded()")
    assert not any("/11/" in url for url in tiles), "the whole image's pixels are not sent"
    frame.click("#one")
    frame.wait_for_function("document.querySelector('#zoom').textContent == '100%'")
    frame.wait_for_function("viewers[0].world.getItemAt(0).getFullyLoaded()")
    sharp = {url for url in tiles if "/clear/11/" in url}
    assert 0 < len(sharp) < 16, "only tiles that are seen"
    next(opened, None)


def test_history_survives_a_reload_and_a_restart(browser, app_server):
    opened = open_page(browser, app_server, restarts=True)
    page = next(opened)
    enter(page, "a violet tower <b>in</b> the desert")
    finished(page)
    page.reload()
    page.wait_for_selector(".card:not(.pending)")
    app_server.stop()
    app_server.start()
    page.reload()
    page.click(".card")
    finished(page)
    assert "a violet tower <b>in</b> the desert" in page.inner_text("#status")
    another = next(other := open_page(browser, app_server))
    another.locator("#cards", has_text="Nothing yet").wait_for()
    next(other, None)
    next(opened, None)


def test_a_reload_follows_the_image_at_work(page):
    enter(page, "a red balloon over a green island", steps=100, size=512)
    page.wait_for_selector(".status.running")
    page.reload()
    page.wait_for_selector(".status.running")
    page.click("#cancel")
    page.wait_for_selector(".status.cancelled")


def test_bad_input_is_told_and_nothing_is_queued(page):
    for entered, words in (
        ({"prompt": " "}, "prompt is empty"),
        ({"steps": 1000}, "Steps must be from 1 to 100"),
        ({"size": 250}, "multiple of 16"),
        ({"size": 8192}, "at most 4,194,304"),
    ):
        enter(page, **({"prompt": "a house"} | entered))
        page.locator(".toast-body", has_text=words).wait_for()
        assert page.locator(".status").count() == 0


def test_readable_on_a_phone(browser, app_server):
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True)
    page = context.new_page()
    page.goto(app_server.url)
    page.wait_for_selector("#generate")
    widest = page.evaluate(
        "Math.max(...[...document.querySelectorAll('main *')]"
        ".map(one => one.getBoundingClientRect().right))"
    )
    assert widest <= 390, "nothing is cut off"
    assert page.locator("#prompt").bounding_box()["width"] > 340
    context.close()
