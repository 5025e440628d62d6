"""Settings come back: from a card, as a command, by a link, from a file."""

import shlex
from urllib.parse import quote

from support.slow import slow
from support.web_page import act, ask, job, make_image, unfold

pytestmark = slow

SETTINGS = {
    "prompt": "a green <i>tower</i> & 'more' by the sea, 100% #1",
    "negative_prompt": "fog",
    "width": 320,
    "height": 256,
    "attention": "both",
    "radius": 12,
    "down_factor": 2,
    "steps": 3,
    "guidance": 1.5,
    "seed": 99,
}


def form_of(page):
    """What the page would ask for."""
    with page.expect_request("**/api/estimate*") as asked:
        page.dispatch_event("#prompt", "input")
    return asked.value.post_data_json


def has_settings(page, expected=SETTINGS):
    found = form_of(page)
    return {name: found[name] for name in expected} == expected


def test_use_settings_restores_everything_and_can_be_undone(visit):
    page = visit(jobs=[job(1, entry=SETTINGS)])
    page.locator(".card").wait_for()
    unfold(page)
    page.fill("#prompt", "something else")
    page.locator(".card .more").click()
    page.click("#menu >> text=Use settings")
    page.locator("#toast", has_text="Settings taken over").wait_for()
    assert has_settings(page)
    assert page.get_attribute("#lock", "aria-pressed") == "true"
    page.click("#toast >> text=Undo")
    assert page.input_value("#prompt") == "something else"
    act(page, "Use settings")
    page.locator("#toast", has_text="Settings taken over").wait_for()
    assert has_settings(page)


def test_copy_as_command_and_copy_link(visit):
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    made = make_image(page, prompt="a blue 'house' by night", steps=1, strength=0.25)
    act(page, "Copy as command")
    page.locator("#toast", has_text="Command copied").wait_for()
    words = shlex.split(page.evaluate("navigator.clipboard.readText()"))
    assert words[:3] == ["clear-dit", "generate", made["entry"]["prompt"]]
    assert words[words.index("--seed") + 1] == str(made["entry"]["seed"])
    act(page, "Copy link")
    page.locator("#toast", has_text="Link copied").wait_for()
    link = page.evaluate("navigator.clipboard.readText()")
    # To a new visitor, with the form filled in; the address keeps nothing of it.
    other = visit(part=link.split("/", 3)[3])
    other.locator("#toast", has_text="Filled in from the link").wait_for()
    told = {name: made["entry"][name] for name in SETTINGS}
    assert has_settings(other, told)
    assert other.input_value("#f-strength") == "0.25"
    assert "#" not in other.url


def test_a_link_opens_in_a_page_that_is_open(visit):
    page = visit()
    page.fill("#prompt", "typed before")
    page.evaluate("location.hash = 'prompt=' + encodeURIComponent('by link') + '&seed=5'")
    page.locator("#toast").wait_for()
    assert has_settings(page, {"prompt": "by link", "seed": 5})
    page.click("#toast >> text=Undo")
    assert page.input_value("#prompt") == "typed before"


def test_a_link_of_somebody_else_is_read_strictly(visit):
    hostile = {
        "prompt": "x" * 2001,
        "width": "1e3",
        "height": "-16",
        "steps": "5000",
        "attention": "<img>",
        "far": "maybe",
        "seed": "99999999999999999999",
        "image": "a-name",
        "__proto__": "1",
        "constructor": "1",
        "radius": "16",
    }
    told = "&".join(f"{name}={quote(value)}" for name, value in hostile.items())
    page = visit(part=f"#{told}")
    page.locator("#toast", has_text="Not understood: prompt, width, height").wait_for()
    found = form_of(page)
    assert found["radius"] == 16
    assert (found["prompt"], found["width"], found["image"]) == ("", 512, "")
    page = visit(part="#prompt=" + "y" * 50_000)
    page.locator("#toast", has_text="Not understood: its length").wait_for()
    assert page.input_value("#prompt") == ""


def test_what_cannot_be_copied_is_shown(visit):
    page = visit(jobs=[job(1)])
    page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error()); }")
    act(page, "Copy as command")
    field = page.locator("dialog textarea")
    field.wait_for()
    assert field.input_value() == job(1)["command"]
    assert field.evaluate("field => field.selectionEnd - field.selectionStart") > 10
    page.keyboard.press("Escape")
    page.locator("dialog").wait_for(state="detached")


def test_a_file_that_tells_its_settings_is_used_as_one_likes(visit, tmp_path):
    page = visit()
    made = make_image(page, **SETTINGS | {"attention": "clear", "radius": 8, "down_factor": 1})
    file = tmp_path / "made.png"
    address = f"{page.url}images/{made['id']}/clear.png"
    file.write_bytes(page.request.get(address).body())
    page.set_input_files("#file", file)
    page.locator("dialog", has_text="made.png tells how it was made").wait_for()
    page.click("text=Use its settings")
    page.locator("#toast", has_text="Settings taken over").wait_for()
    names = ("prompt", "negative_prompt", "width", "height", "steps", "guidance", "seed")
    assert has_settings(page, {name: SETTINGS[name] for name in names})
    assert page.locator("#uploaded").is_hidden()
    page.fill("#prompt", "")
    page.set_input_files("#file", file)
    page.click("text=Enlarge this image")
    page.locator("#uploaded").wait_for()
    found = form_of(page)
    assert (found["width"], found["height"]) == (640, 512)
    assert found["prompt"] == SETTINGS["prompt"]
    assert found["image"] != ""
    page.set_input_files("#file", file)
    page.click("dialog >> text=Nothing")
    assert ask(page, "GET", "api/jobs")["jobs"][0]["id"] == made["id"]
