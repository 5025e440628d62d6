"""The image to enlarge: however it comes, and what is said when it does not."""

import pytest
from PIL import Image
from support.slow import slow
from support.web_page import ask, enter, finished

pytestmark = slow

FILE = """([name, bytes]) => { const data = new DataTransfer();
  data.items.add(new File([new Uint8Array(bytes)], name, {type: 'image/png'}));
"""
DROP = f"""{FILE}
  const fire = (type, at) => at.dispatchEvent(new DragEvent(type, {{
    dataTransfer: data, bubbles: true, cancelable: true}}));
  fire('dragenter', document.body);
  const shown = !document.querySelector('#drop').hidden;
  fire('drop', document.querySelector('#drop'));
  return shown && document.querySelector('#drop').hidden;
}}"""
PASTE = f"""{FILE}
  window.dispatchEvent(new ClipboardEvent('paste', {{clipboardData: data, cancelable: true}}));
  return true;
}}"""


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.effect_noise((128, 64), 40).convert("RGB").save(path)
    return path


def uploaded(page, name="photo.png"):
    page.locator("#upload-name", has_text=name).wait_for()
    page.locator("#upload-preview").evaluate("image => image.decode()")
    return page.inner_text("#upload-size")


def test_chosen_replaced_removed_and_the_same_file_again(visit, photo, tmp_path):
    page = visit()
    with page.expect_file_chooser() as chooser:
        page.click("#choose")
    chooser.value.set_files(photo)
    assert uploaded(page) == "128 × 64 px"
    assert (page.input_value("#f-width"), page.input_value("#f-height")) == ("256", "128")
    other = tmp_path / "other.png"
    Image.new("RGB", (64, 64), "red").save(other)
    with page.expect_file_chooser() as chooser:
        page.click("#replace")
    chooser.value.set_files(other)
    assert uploaded(page, "other.png") == "64 × 64 px"
    page.click("#remove")
    assert page.locator("#uploaded").is_hidden()
    page.set_input_files("#file", other)
    assert uploaded(page, "other.png") == "64 × 64 px"
    page.reload()
    uploaded(page, "other.png")
    enter(page, width=128, height=128)
    page.click("#generate")
    finished(page)
    assert ask(page, "GET", "api/jobs")["jobs"][0]["image_name"] == "other.png"


def test_what_was_asked_for_before_comes_back_when_it_is_removed(visit, photo):
    page = visit()
    enter(page, width=384, height=320)
    page.set_input_files("#file", photo)
    uploaded(page)
    with page.expect_response("**/uploads/*.jpg"):
        page.set_input_files("#file", photo)
    uploaded(page)
    page.fill("#f-strength", "0.7")
    assert page.input_value("#f-width") == "256"
    page.reload()
    uploaded(page)
    page.click("#remove")
    names = ("width", "height", "strength")
    assert [page.input_value(f"#f-{name}") for name in names] == ["384", "320", ""]


def test_by_the_keyboard_alone(visit, photo):
    page = visit()
    with page.expect_file_chooser() as chooser:
        page.wait_for_timeout(300)  # until the browser hands choosers over, which none waits for
        page.locator("#choose").focus()
        page.keyboard.press("Enter")
    chooser.value.set_files(photo)
    uploaded(page)
    assert page.evaluate("document.activeElement.id") == "replace"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.locator("#uploaded").wait_for(state="hidden")
    assert page.evaluate("document.activeElement.id") == "choose"


@pytest.mark.parametrize("way", [DROP, PASTE])
def test_dropped_anywhere_or_pasted(visit, way, photo):
    page = visit()
    assert page.evaluate(way, ["photo.png", list(photo.read_bytes())])
    assert uploaded(page) == "128 × 64 px"


def test_a_failure_clears_the_old_one_and_says_why(visit, photo, tmp_path):
    page = visit()
    page.set_input_files("#file", photo)
    uploaded(page)
    text = tmp_path / "text.png"
    text.write_text("no image")
    page.set_input_files("#file", text)
    page.locator("#upload-problem").wait_for()
    assert page.locator("#uploaded").is_hidden()
    assert page.locator("#choose").is_visible()
    page.set_input_files("#file", photo)
    uploaded(page)
    assert page.locator("#upload-problem").is_hidden()


def test_what_is_too_large_is_not_sent(visit, photo):
    page = visit(setup={"limits": LIMITS})
    sent = []
    page.on("request", lambda one: sent.append(one.url) if "/uploads" in one.url else None)
    page.set_input_files("#file", photo)
    page.locator("#upload-problem", has_text="at most 1 kB can be sent").wait_for()
    assert sent == []


LIMITS = {"images": 4, "prompt": 2000, "steps": 100, "upload_bytes": 1000, "full_pixels": 10**7}


def test_offline_is_told_and_nothing_is_lost(visit, photo):
    page = visit(away=True)
    enter(page, "a tower")
    page.context.set_offline(True)
    page.locator("#banner", has_text="You are offline").wait_for()
    page.set_input_files("#file", photo)
    page.locator("#upload-problem", has_text="You are offline; photo.png was not sent").wait_for()
    page.click("#generate")
    page.locator("#toast", has_text="What you have entered is kept").wait_for()
    page.context.set_offline(False)
    page.locator("#banner").wait_for(state="hidden")
    page.set_input_files("#file", photo)
    uploaded(page)
    assert page.input_value("#prompt") == "a tower"


def test_an_upload_that_is_gone_is_told(visit, photo):
    page = visit()
    page.set_input_files("#file", photo)
    uploaded(page)
    page.route("**/uploads/*.jpg", lambda route: route.fulfill(status=404))
    page.reload()
    page.locator("#upload-problem", has_text="no longer on the server").wait_for()
    assert page.locator("#uploaded").is_hidden()
