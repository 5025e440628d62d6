"""Names and prompts of others, in every place where text is shown: as text, and never as markup."""

import io

import pytest
from PIL import Image
from support.slow import slow
from support.web_page import ask, enter, finished, job, pretend

pytestmark = slow

HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
    "</textarea><script>alert(1)</script>",
    "</title><svg onload=alert(1)>",
    "\"><img src=x onerror='alert(1)'>",
    "'\" onmouseover=alert(1) x='",
    "javascript:alert(1)",
    "${alert(1)}",
    "{{constructor.constructor('alert(1)')()}}",
    "<iframe srcdoc='<script>parent.alert(1)</script>'>",
    "<a href=javascript:alert(1)>click</a>",
    "<style>*{display:none!important}</style>",
    "<base href=//example.org/>",
    "<meta http-equiv=refresh content=0;url=//example.org>",
    "&lt;img src=x onerror=alert(1)&gt; &amp; &#x3c;b&#x3e;",
    "%3Cimg%20src%3Dx%20onerror%3Dalert(1)%3E",
    "<!--<script>-->alert(1)//",
    "\u202egnp.exe <b>\u2066\u200b",
    "<math><mtext><table><mglyph><style><img src=x onerror=alert(1)>",
    "__proto__ constructor toString",
)
TRAPS = """() => { window.ran = 0; window.alert = () => { window.ran += 1; };
  window.elements = document.querySelectorAll('*').length; }"""


def unharmed(page):
    """No script ran, and no element came from a text."""
    strange = "script:not([src]), base, math, [onload], [onerror], [onmouseover], [srcdoc]"
    assert page.evaluate("window.ran") == 0
    assert page.locator(strange).count() == 0
    assert page.locator("#page style, #page meta").count() == 0
    assert page.locator("a[href^='javascript:']").count() == 0
    assert page.locator("#page img[src='x']").count() == 0


@pytest.mark.parametrize("state", ["done", "running", "waiting", "failed", "stopped"])
def test_hostile_texts_of_jobs_are_shown_as_they_are(visit, state):
    jobs = [
        job(
            number,
            state=state,
            entry={"prompt": text, "negative_prompt": text, "model": text, "lora": text},
            image_name=text,
            error=text,
            phase=text,
            command=text,
        )
        for number, text in enumerate(HOSTILE, 1)
    ]
    page = visit(jobs=jobs)
    page.evaluate(TRAPS)
    page.locator(".card").nth(len(HOSTILE) - 1).wait_for()
    for number, text in enumerate(HOSTILE):
        card = page.locator(".card").nth(number)
        assert text in card.locator(".open").get_attribute("aria-label")
        card.locator(".open").click()
        assert page.text_content("#prompt-shown") == text
        assert page.text_content("#negative-shown") == f"Without: {text}"
        assert page.text_content("#facts").count(text) >= 3
        if state == "failed":
            assert page.text_content("#stage p") == text
    if state == "running":
        assert page.text_content("#phase") == HOSTILE[-1]
    page.click(".card .more >> nth=0")
    page.click("#menu >> text=Use settings")
    page.locator("#toast", has_text="Not offered here").wait_for()
    assert page.input_value("#prompt") == HOSTILE[0]
    unharmed(page)


def test_hostile_texts_of_the_server_are_shown_as_they_are(visit):
    models = [
        {"name": text, "title": text, "family": text, "size": 256, "sizes": [256], "step": 16}
        | {"radius": 8, "steps": 4, "guidance": 1.0, "negative": True, "words": [text]}
        for text in HOSTILE
    ]
    shapes = {text: [1, 1] for text in HOSTILE}
    setup = {"models": models, "loras": HOSTILE, "examples": HOSTILE, "shapes": shapes}
    page = visit(setup=setup | {"account": HOSTILE[0]})
    page.evaluate(TRAPS)
    assert page.text_content("#account-name") == HOSTILE[0]
    for text in HOSTILE:
        notes = {"allowed": True, "notes": [text], "stages": [], "seconds": 1, "flops": 1}
        pretend(page, "/api/estimate", notes | {"reason": None, "field": None})
        page.select_option("#f-model", value=text) if page.is_visible("#f-model") else page.click(
            "#more summary"
        )
        page.select_option("#f-model", value=text)
        page.select_option("#f-lora", value=text)
        page.locator(f"#notes li:text-is({_quoted(text)})").wait_for()
        assert page.text_content("#words-list") == text
        refused = {"allowed": False, "reason": text, "field": "width"}
        pretend(page, "/api/estimate", notes | refused)
        page.press("#f-steps", "ArrowUp")
        page.locator(f"#field-error:text-is({_quoted(text)})").wait_for()
    assert page.locator(".example").all_text_contents() == list(HOSTILE)
    pretend(page, "/api/jobs", {"error": HOSTILE[1], "field": None}, status=429)
    page.fill("#prompt", "a house")
    page.click("#generate")
    page.locator("#toast.problem").wait_for()
    assert page.locator("#toast span").text_content() == HOSTILE[1]
    unharmed(page)


def test_hostile_names_of_files_are_shown_as_they_are(visit):
    page = visit()
    page.evaluate(TRAPS)
    upload = {"name": "a" * 22, "width": 64, "height": 64, "settings": None}
    small = io.BytesIO()
    Image.new("RGB", (8, 8)).save(small, "JPEG")
    page.route("**/uploads/*.jpg", lambda route: route.fulfill(body=small.getvalue()))
    for text in HOSTILE:
        pretend(page, "/uploads", upload)
        file = {"name": text, "mimeType": "image/png", "buffer": b"x"}
        page.evaluate("text => { window.file = new File(['x'], text); }", text)
        page.evaluate(
            """() => { const data = new DataTransfer(); data.items.add(window.file);
            window.dispatchEvent(new DragEvent('drop', {dataTransfer: data})); }"""
        )
        page.locator(f"#upload-name:text-is({_quoted(text)})").wait_for()
        pretend(page, "/uploads", {"error": f"No: {text}", "field": "image"}, status=400)
        page.set_input_files("#file", file | {"name": "other.png"})
        page.locator("#upload-problem:visible").wait_for()
        assert page.text_content("#upload-problem") == f"No: {text}"
        assert page.locator("#uploaded").is_hidden()
    settings = {"prompt": HOSTILE[0], "attention": HOSTILE[1], "down_factor": HOSTILE[2]}
    settings |= {"radius": HOSTILE[3], "far": HOSTILE[4], "width": HOSTILE[5]}
    pretend(page, "/uploads", upload | {"settings": settings})
    page.set_input_files("#file", {"name": HOSTILE[0], "mimeType": "image/png", "buffer": b"x"})
    page.locator("dialog h2", has_text=f"{HOSTILE[0]} tells how it was made").wait_for()
    page.click("text=Use its settings")
    page.locator("#toast", has_text="Settings taken over").wait_for()
    assert page.input_value("#prompt") == HOSTILE[0]
    assert page.input_value("#f-width") == HOSTILE[5]
    assert page.input_value("#f-radius") == "8"
    unharmed(page)


@pytest.mark.parametrize("text", HOSTILE[:2])
def test_a_hostile_prompt_on_its_whole_way(visit, text):
    page = visit()
    page.evaluate(TRAPS)
    enter(page, text)
    page.click("#generate")
    finished(page).locator("canvas").first.wait_for()
    assert page.text_content("#prompt-shown") == text
    assert ask(page, "GET", "api/jobs")["jobs"][0]["entry"]["prompt"] == text
    unharmed(page)


def _quoted(text):
    """For a selector of playwright, which takes white space as one blank."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
