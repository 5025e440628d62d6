"""Every state of the page for who listens, uses a keyboard, or sees little (axe-core)."""

import pytest
from support.slow import slow
from support.web_page import (
    enter,
    finished,
    job,
    look_at_once,
    make_image,
    pretend,
    pretend_jobs,
    unfold,
)

pytestmark = slow

WAITING = [job(place, state="waiting", place=place - 1, waiting=2) for place in (2, 3)]
JOBS = {
    "empty": [],
    "running": [job(1, state="running"), *WAITING],
    "waiting": WAITING,
    "failed": [job(1, state="failed", error="There was not enough memory."), job(2)],
    "stopped": [job(1, state="stopped", error="The server was stopped."), job(2, favourite=True)],
    "done": [job(1, favourite=True, image_name="photo.png"), job(2)],
}
SHOWN = """states => [...document.querySelectorAll('.card')]
  .map(card => card.dataset.state).join() === states.join()"""
LOOKS = [("desktop", "light"), ("desktop", "dark"), ("tablet", "dark"), ("phone", "light")]
LOOKS += [("phone", "dark")]


def violations(page):
    """Of axe-core's rules, and where."""
    from axe_playwright_python.sync_playwright import Axe

    # The viewer's image is asked for without a server behind it; it is looked at by itself.
    found = Axe().run(page, {"exclude": ["iframe"]}).response["violations"]
    return [(one["id"], [node["html"][:120] for node in one["nodes"]]) for one in found]


@pytest.mark.parametrize(("size", "scheme"), LOOKS)
def test_no_violation_in_any_state_of_a_job(visit, size, scheme):
    page = visit(size=size, scheme=scheme, jobs=[], reduced_motion="reduce")
    for state, jobs in JOBS.items():
        pretend_jobs(page, *jobs)
        look_at_once(page)
        page.wait_for_function(SHOWN, arg=[one["state"] for one in jobs])
        assert violations(page) == [], state
    unfold(page)
    page.locator("#generate").wait_for()
    assert violations(page) == []


@pytest.mark.parametrize(("size", "scheme"), LOOKS)
def test_no_violation_while_the_form_is_filled_in(visit, size, scheme, tmp_path):
    from PIL import Image

    page = visit(size=size, scheme=scheme, reduced_motion="reduce", setup={"loras": ["ink"]})
    page.click("#words summary")
    enter(page, "a dragon", width="25o")
    page.select_option("#f-lora", "ink")
    page.locator("#f-width[aria-invalid=true]").wait_for()
    assert violations(page) == []
    told = {"allowed": True, "reason": None, "field": None, "stages": [], "notes": ["A note."]}
    told |= {"seconds": 40.0, "memory_bytes": 1e9, "queue_seconds": 60.0, "flops": 2e12}
    pretend(page, "/api/estimate", told)
    Image.new("RGB", (64, 64), "teal").save(tmp_path / "photo.png")
    page.set_input_files("#file", tmp_path / "photo.png")
    page.locator("#uploaded").wait_for()
    page.locator("#notes li").wait_for()
    assert violations(page) == []
    for field in ("attention", "prompt", "image", "lora"):
        refused = told | {"allowed": False, "field": field, "reason": "No."}
        pretend(page, "/api/estimate", refused)
        page.check("input[name=attention][value=full]")
        page.check("input[name=attention][value=clear]")
        page.locator("#field-error").wait_for()
        assert violations(page) == []


@pytest.mark.parametrize(("size", "scheme"), [LOOKS[0], LOOKS[1], LOOKS[4]])
def test_no_violation_with_what_lies_above_the_page(visit, size, scheme):
    jobs = [job(1, state="running", ran=100), job(2)]
    page = visit(away=True, size=size, scheme=scheme, jobs=jobs, reduced_motion="reduce")
    page.click(".card .more >> nth=1")
    page.locator("#menu .item >> nth=0").wait_for()
    assert violations(page) == []
    page.keyboard.press("Escape")
    page.click("#cancel")
    page.locator("dialog").wait_for()
    assert violations(page) == []
    page.keyboard.press("Escape")
    page.evaluate("() => { document.querySelector('#drop').hidden = false; }")
    assert violations(page) == []
    page.evaluate("() => { document.querySelector('#drop').hidden = true; }")
    page.click(".card[data-state=done] .open")
    page.click(".card .more >> nth=1")
    page.click("#menu >> text=Delete")
    page.locator("#toast button").nth(1).wait_for()
    page.context.set_offline(True)
    page.locator("#banner", has_text="You are offline").wait_for()
    assert violations(page) == []
    page.context.set_offline(False)


def test_no_violation_in_the_viewer(visit):
    page = visit()
    made = make_image(page, attention="both")
    finished(page).locator("canvas").first.wait_for()
    page.goto(f"{page.url}view/{made['id']}")
    page.locator("#slider").wait_for()
    assert violations(page) == []


def test_everything_is_reached_by_the_keyboard_and_seen_to_be(visit):
    page = visit(jobs=[job(1), job(2, state="running"), job(3, state="failed")])
    page.locator(".card >> nth=2").wait_for()
    unfold(page)
    page.locator("#prompt").focus()
    controls = "button, a[href], input:not([type=file]), select, textarea, summary, iframe"
    # Of radio buttons with one name the chosen one is reached, the others by arrows.
    expected = page.locator(controls).evaluate_all(
        """all => all.filter(one => one.checkVisibility({visibilityProperty: true}) &&
             !(one.type === 'radio' && !one.checked)).length"""
    )
    seen = 1
    marks = (
        "() => { const a = document.activeElement; const was = a.mark; a.mark = true; return was; }"
    )
    page.evaluate(marks)
    outline = """() => { const a = document.activeElement;
        const shown = a.type === 'radio' ? a.closest('label') : a;
        return a.tagName === 'IFRAME' || parseFloat(getComputedStyle(shown).outlineWidth) >= 2; }"""
    for _ in range(2 * expected + 20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement === document.body"):
            continue
        if page.evaluate(marks):
            continue
        seen += 1
        assert page.evaluate(outline), page.evaluate("document.activeElement.outerHTML")
    assert seen >= expected


def test_nothing_moves_for_who_does_not_want_it(visit):
    page = visit(jobs=[job(1, state="running")], reduced_motion="reduce")
    page.locator("#stage .place").wait_for()
    running = "document.getAnimations().length"
    assert page.evaluate(running) == 0
    page = visit(jobs=[job(1, state="running")])
    page.locator("#stage .place").wait_for()
    assert page.evaluate(running) > 0


def test_what_happens_is_said(visit):
    page = visit()
    page.evaluate(
        """() => { window.said = []; const live = document.querySelector('#live');
        new MutationObserver(() => window.said.push(live.textContent))
          .observe(live, {childList: true}); }"""
    )
    enter(page)
    page.click("#generate")
    finished(page)
    said = page.evaluate("window.said")
    assert said[0] == "In the queue"
    assert said[-1] == "Done"
    assert page.get_attribute("#live", "role") == "status"
