"""The page on screens of three sizes, light and dark."""

import pytest
from support.slow import slow
from support.web_page import SIZES, enter, finished, job

pytestmark = slow

WIDEST = """Math.max(...[...document.querySelectorAll('body *')]
  .filter(one => one.checkVisibility()).map(one => one.getBoundingClientRect().right))"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_nothing_is_cut_off(visit, size, scheme):
    long = "x" * 300 + " " + "word " * 100
    page = visit(
        size=size,
        scheme=scheme,
        jobs=[
            job(1, entry={"prompt": long, "model": "m" * 90}, image_name="n" * 200),
            job(2, state="running", phase="p" * 120),
            job(3, state="failed", error="e" * 300),
        ],
    )
    for number in range(3):
        page.click(f".card .open >> nth={number}")
        assert page.evaluate(WIDEST) <= SIZES[size][0]
    if size == "phone":
        page.click("#fold")
    page.click("#words summary")
    enter(page, long, width="y" * 60)
    page.locator("#f-width[aria-invalid=true]").wait_for()
    assert page.evaluate(WIDEST) <= SIZES[size][0]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_as_the_visitor_has_it(visit, scheme):
    page = visit(scheme=scheme)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    levels = [int(part) for part in background[4:-1].split(",")]
    assert all(level > 200 if scheme == "light" else level < 50 for level in levels)


def test_a_phone_has_the_image_first_and_the_prompt_once(visit):
    page = visit(size="phone")
    assert page.locator("#prompt").is_visible(), "who comes first enters a prompt"
    enter(page, "a violet tower in the desert")
    page.locator("#generate").tap()
    finished(page)
    page.locator("#fields").wait_for(state="hidden")
    stage, fold, cards = (
        page.locator(one).bounding_box()["y"] for one in ("#stage", "#fold", "#cards")
    )
    assert stage < fold < cards
    assert stage < 100
    assert page.get_attribute("#fold", "aria-expanded") == "false"
    shown = page.get_by_text("a violet tower in the desert", exact=True)
    assert [one.is_visible() for one in shown.all()].count(True) == 1
    page.locator("#fold").tap()
    assert page.get_attribute("#fold", "aria-expanded") == "true"
    assert page.locator("#prompt").is_visible()
    page.reload()
    page.wait_for_selector("#stage .viewer")
    assert page.locator("#prompt").is_hidden()


@pytest.mark.parametrize("size", SIZES)
def test_generate_is_always_in_sight_beside_the_form(visit, size):
    page = visit(size=size)
    page.click("#more summary")
    page.locator("#f-negative").focus()
    box, field = (page.locator(one).bounding_box() for one in ("#generate", "#f-negative"))
    assert 0 < box["y"] < SIZES[size][1] - 40
    assert field["y"] + field["height"] <= box["y"], "what has the focus is not hidden"


def test_a_phone_shows_examples_and_the_prompt_at_first(visit):
    page = visit(size="phone")
    on_top = """one => { const { left, top } = one.getBoundingClientRect();
        return one.contains(document.elementFromPoint(left + 9, top + 9)); }"""
    for shown in (".example >> nth=0", ".example >> nth=-1", "#prompt", "#generate"):
        assert page.locator(shown).evaluate(on_top), shown
    boxes = [page.locator(one).bounding_box() for one in ("#swap", "#f-width")]
    assert boxes[0]["height"] == boxes[1]["height"]
    assert boxes[0]["y"] == boxes[1]["y"]
    boxes = [page.locator(one).bounding_box() for one in ("#images", "#f-seed")]
    assert boxes[0]["height"] == boxes[1]["height"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("height", [700, 844])
def test_a_message_lies_over_no_buttons(visit, size, height):
    page = visit(size=size, jobs=[job(1), job(2)])
    page.set_viewport_size({"width": SIZES[size][0], "height": height})
    page.locator(".card >> nth=1").wait_for()
    page.click(".card .more >> nth=1")
    page.click("#menu >> text=Delete")
    toast = page.locator("#toast")
    toast.wait_for()
    over = """one => { const [own, other] = [document.querySelector("#toast"), one].map(
          each => each.getBoundingClientRect());
        return own.top < other.bottom && other.top < own.bottom
          && own.left < other.right && other.left < own.right; }"""
    for act in ("menu", "up", "form"):
        if act == "up":
            page.evaluate("scrollTo(0, 0)")
        elif act == "form" and size == "phone":
            page.click("#fold")
        page.wait_for_timeout(200)
        for each in ("#opened-buttons", "#fold", "#go"):
            assert not page.locator(each).evaluate(over), (act, each)
        own = toast.bounding_box()
        assert own["y"] > 0
        assert own["x"] + own["width"] <= SIZES[size][0]
