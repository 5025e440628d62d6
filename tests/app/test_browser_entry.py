"""The form: kept as typed, told before it is sent, and refused in the visitor's words."""

import re

import pytest
from support.slow import slow
from support.web_page import ask, enter, finished, job, pretend, pretend_jobs, unfold

pytestmark = slow

FIELDS = ("prompt", "f-negative", "f-width", "f-height", "f-steps", "f-guidance", "f-strength")


def test_what_was_typed_is_there_after_a_reload_as_typed(visit):
    page = visit()
    enter(page, width=1024, height=1024, strength="0.")
    enter(
        page,
        "  a tower, 50% <b>",
        width="25o",
        steps="",
        guidance="2,5",
        negative="fog",
    )
    page.select_option("#f-radius", "16")
    page.select_option("#f-variant", label="Sees all")
    page.check("input[name=images][value='2']")
    page.check("input[name=attention][value=both]")
    page.fill("#f-seed", "123")
    before = {name: page.input_value(f"#{name}") for name in FIELDS}
    page.reload()
    page.locator("#page").wait_for()
    assert {name: page.input_value(f"#{name}") for name in FIELDS} == before
    assert page.input_value("#f-radius") == "16"
    assert page.input_value("#f-variant") == "1 true"
    assert page.is_checked("input[name=images][value='2']")
    assert page.is_checked("input[name=attention][value=both]")
    assert page.input_value("#f-seed") == "123"
    assert page.get_attribute("#lock", "aria-pressed") == "true"
    # Another visitor knows nothing of it.
    assert visit().input_value("#prompt") == ""


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("width", "25o", "Width must be a whole number"),
        ("height", "250", "Height must be a multiple of 16 pixels; the nearest are 240 and 256"),
        ("width", "8192", "this server generates at most 4,194,304"),
        ("steps", "1000", "Steps must be from 1 to 100"),
        ("guidance", "much", "Guidance must be a number"),
        ("seed", "1.5", "Seed must be a whole number"),
        ("strength", "2", "Strength must be from 0 to 1"),
    ],
)
def test_what_is_refused_is_said_beside_its_field_before_it_is_sent(visit, field, value, words):
    page = visit()
    if field == "strength":  # which is there above the native size
        enter(page, width=1024, height=1024)
        page.fill("#f-strength", value)
    enter(page, **{field: value} | ({"height": "8192"} if value == "8192" else {}))
    control = page.locator(f"#f-{field}")
    page.locator(f"#f-{field}[aria-invalid=true]").wait_for()
    described = control.get_attribute("aria-describedby").split()
    assert words in page.inner_text(f"#{described[-1]}")
    page.evaluate("document.querySelector('#more').open = false")
    page.click("#generate")
    page.wait_for_function("id => document.activeElement.id === id", arg=f"f-{field}")
    assert page.locator(".card").count() == 0
    page.fill(f"#f-{field}", "256" if field in ("width", "height") else "1")
    page.fill("#f-height", "256")
    page.locator("#estimate", has_text="MB").wait_for()
    assert control.get_attribute("aria-invalid") is None
    assert page.locator("#field-error").count() == 0


def test_what_is_refused_is_said_where_its_field_is_folded_away(visit):
    page = visit()
    enter(page, steps=1000)
    page.locator("#field-error", has_text="Steps must be").wait_for()
    page.click("#more summary")
    page.fill("#prompt", "a violet tower")
    page.locator("#estimate.error", has_text="Steps must be from 1 to 100").wait_for()


def test_an_empty_prompt_is_told_only_to_who_presses_generate(visit):
    page = visit()
    page.wait_for_timeout(1500)
    assert page.locator("[aria-invalid]").count() == 0
    page.click("#generate")
    words = "Enter a prompt first: what the image should show."
    page.locator("#field-error", has_text=words).wait_for()
    page.wait_for_timeout(1500)
    message, prompt = (page.locator(one).bounding_box() for one in ("#field-error", "#prompt"))
    assert 0 <= message["y"] - prompt["y"] - prompt["height"] < 20
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.fill("#prompt", "a tower")
    assert page.locator("#field-error").count() == 0


def test_seconds_memory_and_stages_are_told_before(visit):
    page = visit()
    enter(page, width=1024, height=1024)
    page.locator("#plan", has_text="512 × 512 → 1024 × 1024 px").wait_for()
    assert re.search(r"(about .* s|after the first image) · .*B", page.inner_text("#estimate"))
    told = {"seconds": 40.0, "memory_bytes": 1.2e9, "queue_seconds": 120.0, "flops": 2e12}
    told |= {"allowed": True, "reason": None, "field": None, "stages": [], "notes": []}
    pretend(page, "/api/estimate", told)
    page.check("input[name=images][value='3']")
    words = "3 images · about 40 s each · at least 1.2 GB of memory · "
    words += "next image starts in about 2 min"
    page.locator("#estimate", has_text=words).wait_for()
    reason = "You have 6 images in the queue and may have 6; wait for one or cancel it."
    pretend(page, "/api/estimate", told | {"allowed": False, "reason": reason})
    page.check("input[name=images][value='1']")
    page.locator("#estimate.error", has_text=reason).wait_for()


def test_what_is_told_before_follows_the_queue(visit):
    page = visit(jobs=[job(1, state="running")])
    told = {"seconds": 40.0, "memory_bytes": 0, "queue_seconds": 60.0, "flops": 2e12}
    told |= {"allowed": True, "reason": None, "field": None, "stages": [], "notes": []}
    pretend(page, "/api/estimate", told)
    enter(page)
    page.locator("#estimate", has_text="next image starts in about 60 s").wait_for()
    asked = []
    page.on("request", lambda one: asked.append(one.url) if "/estimate" in one.url else None)
    pretend(page, "/api/estimate", told | {"queue_seconds": 20.0})
    page.locator("#estimate", has_text="next image starts in about 20 s").wait_for()
    page.wait_for_timeout(4000)
    assert 1 <= len(asked) <= 3
    pretend_jobs(page)
    pretend(page, "/api/estimate", told | {"queue_seconds": 0})
    page.locator("#estimate", has_text=re.compile("^about 40 s$")).wait_for()


def test_the_demo_says_which_words_it_knows_and_which_it_does_not(visit):
    page = visit()
    enter(page, "a dragon")
    page.locator(
        "#notes", has_text="does not know these words, and leaves them out: dragon"
    ).wait_for()
    page.fill("#prompt", "a blue")
    page.click("#words summary")
    page.click("#words-list >> text=/^tower$/")
    assert page.input_value("#prompt") == "a blue tower"
    page.locator("#notes li").wait_for(state="detached")
    enter(page, "house " * 300)
    page.locator("#notes", has_text="this end of it is left out").wait_for()


def test_an_example_is_a_click(visit):
    page = visit()
    page.click(".example >> nth=1")
    assert page.input_value("#prompt") == "a blue house in the hills at night"


def test_the_seed_that_is_shown_is_used_and_goes_up_by_one(visit):
    page = visit()
    enter(page)
    used = []

    def generate():
        unfold(page)
        used.append(page.input_value("#f-seed"))
        page.click("#generate")
        page.locator(".card").nth(len(used) - 1).wait_for()
        page.locator("#generate:not([aria-busy])").wait_for(state="attached")

    generate()
    assert page.input_value("#f-seed") != used[0], "another one for the next image"
    shown = page.input_value("#f-seed")
    unfold(page)
    page.fill("#f-steps", "1000")
    page.click("#generate")
    page.locator("#f-steps[aria-invalid=true]").wait_for()
    assert page.input_value("#f-seed") == shown, "what is refused changes nothing"
    page.fill("#f-steps", "1")
    generate()
    unfold(page)
    page.click("#next-seed")
    locked = page.input_value("#f-seed")
    assert page.get_attribute("#lock", "aria-pressed") == "true"
    generate()
    assert page.input_value("#f-seed") == locked
    unfold(page)
    page.click("#lock")
    generate()
    assert page.input_value("#f-seed") != locked
    page.locator(".card[data-state=done]").nth(3).wait_for()
    jobs = ask(page, "GET", "api/jobs")["jobs"]
    assert [str(job["entry"]["seed"]) for job in reversed(jobs)] == used


def test_a_wrong_size_is_told_before_there_is_a_prompt_and_mended_by_a_click(visit):
    page = visit()
    page.fill("#f-width", "99999")
    page.locator("#field-error", has_text="Width must be from").wait_for()
    page.check("input[name=side][value='512']")
    assert [page.input_value(f"#f-{name}") for name in ("width", "height")] == ["512", "512"]
    page.locator("#field-error").wait_for(state="detached")


def test_strength_is_asked_for_where_it_acts(visit):
    page = visit()
    enter(page)
    strength = page.locator("#f-strength")
    assert strength.is_hidden()
    page.fill("#f-width", "1024")
    page.fill("#f-height", "1024")
    strength.fill("0.5")
    page.fill("#f-width", "256")
    page.fill("#f-height", "256")
    assert strength.is_visible(), "a number that is sent is shown"
    strength.fill("")
    page.fill("#f-steps", "2")
    assert strength.is_hidden()


def test_sizes_shapes_and_the_keyboard(visit):
    page = visit()
    page.check("input[name=side][value='1024']")
    page.check("input[name=shape][value='Landscape 3:2']")
    sides = [page.input_value(f"#f-{name}") for name in ("width", "height")]
    assert sides == ["1024", "688"]
    page.click("#swap")
    assert page.is_checked("input[name=shape][value='Portrait 2:3']")
    page.fill("#f-width", "700")
    assert page.locator("input[name=shape]:checked").count() == 0
    page.press("#f-width", "ArrowUp")
    assert page.input_value("#f-width") == "716"
    enter(page)
    page.press("#prompt", "Control+Enter")
    finished(page)
