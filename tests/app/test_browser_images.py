"""Finished images: looked at, kept, taken away, made larger, and compared."""

import io
import re
import zipfile

from PIL import Image
from support.slow import slow
from support.web_page import act, ask, enter, finished, generate, job, make_image, unfold

pytestmark = slow


def test_download_in_each_format_and_all(visit):
    page = visit()
    make_image(page)
    for name, kind in (("JPEG", "JPEG"), ("WebP", "WEBP"), ("TIFF", "TIFF"), (None, "PNG")):
        if name:
            page.click("#rows >> text=Formats")
        with page.expect_download() as download:
            page.click(f"#menu >> text={name}" if name else "#rows a")
        with Image.open(download.value.path()) as image:
            assert (image.format, image.size) == (kind, (256, 256))
    make_image(page, seed=8)
    with page.expect_download() as download:
        page.click("#zip")
    data = io.BytesIO(download.value.path().read_bytes())
    assert len(zipfile.ZipFile(data).namelist()) == 2


def test_favourites_are_kept_and_shown_alone(visit):
    page = visit()
    assert page.locator("#filter").is_hidden()
    first, _ = make_image(page, seed=1), make_image(page, seed=2)
    page.hover(f".card[data-job='{first['id']}']")
    page.click(f".card[data-job='{first['id']}'] .star")
    page.locator(".card .star[aria-pressed=true]").wait_for()
    page.check("input[name=filter][value=favourites]")
    assert page.locator(".card:visible").count() == 1
    assert page.inner_text("#zip") == "Download all images", "not the favourites alone"
    page.reload()
    page.locator(f".card[data-job='{first['id']}'] .star[aria-pressed=true]").wait_for()
    page.click(f".card[data-job='{first['id']}'] .open")
    page.click("#favourite")
    page.locator("#favourite[aria-pressed=false]").wait_for()
    page.check("input[name=filter][value=favourites]")
    page.locator("#none", has_text="No favourites yet").wait_for()


def test_delete_can_be_undone_and_then_not(visit):
    page = visit()
    first, second = make_image(page, seed=1), make_image(page, seed=2)
    page.click(f".card[data-job='{first['id']}'] .open")
    act(page, "Delete")
    page.locator(f".card[data-job='{first['id']}']").wait_for(state="detached")
    assert second["id"] in page.get_attribute("#stage .viewer", "src")
    page.click("#toast >> text=Undo")
    page.locator(f".card[data-job='{first['id']}'] [aria-current]").wait_for()
    act(page, "Delete")
    page.reload()  # whoever leaves has decided
    page.locator(f".card[data-job='{second['id']}']").wait_for()
    assert page.locator(".card").count() == 1
    act(page, "Delete")
    with page.expect_response(re.compile(second["id"])) as answer:
        page.click("#toast >> text=Close")
    assert answer.value.status in (200, 204)
    page.locator("#stage", has_text="Your image appears here").wait_for()
    assert ask(page, "GET", "api/jobs")["jobs"] == []


def test_a_delete_is_sent_once_and_an_undone_one_never(visit):
    page = visit()
    page.clock.install()
    first, second, third = (make_image(page, seed=seed) for seed in (1, 2, 3))
    sent = []
    page.on("request", lambda one: sent.append(one.url) if one.method == "DELETE" else None)
    page.click(f".card[data-job='{second['id']}'] .open")
    act(page, "Delete")
    page.click("#toast >> text=Undo")
    page.locator(f".card[data-job='{second['id']}'] [aria-current]").wait_for()
    assert page.locator("#live").text_content() == "Undone"
    page.clock.run_for(60_000)
    assert sent == []
    act(page, "Delete")
    page.mouse.move(5, 400)
    page.clock.run_for(25_000)
    assert len(sent) == 0, "there is time to think again"
    with page.expect_response(re.compile(second["id"])) as answer:
        page.clock.run_for(6_000)
    assert answer.value.ok
    page.clock.run_for(60_000)
    assert len(sent) == 1
    assert page.locator("#toast").is_hidden(), "what was asked for needs no message"
    assert first["id"] in page.get_attribute("#stage .viewer", "src"), "the next one is opened"
    assert page.locator(".card").count() == 2
    left = {job["id"] for job in ask(page, "GET", "api/jobs")["jobs"]}
    assert left == {first["id"], third["id"]}


def test_two_clicks_delete_one_and_undo_brings_all_back(visit):
    page = visit(jobs=[job(number) for number in range(1, 5)])
    sent = []
    page.on("request", lambda one: sent.append(one.url) if one.method == "DELETE" else None)
    page.locator(".card >> nth=3").wait_for()
    for left in (3, 2):
        if page.is_visible("#delete"):
            page.dblclick("#delete")
        else:
            act(page, "Delete")
        page.wait_for_timeout(300)
        assert page.locator(".card").count() == left
    page.locator("#toast", has_text="2 images deleted").wait_for()
    page.click("#toast >> text=Undo")
    page.locator(".card >> nth=3").wait_for()
    assert sent == []


def test_upscale_makes_it_twice_as_large_and_vary_another(visit):
    page = visit()
    made = make_image(page, seed=5)
    page.click("#rows >> text=Vary")
    page.locator("#uploaded").wait_for()
    assert page.input_value("#f-strength") == "0.6"
    assert page.input_value("#f-seed") != "5"
    assert page.input_value("#f-width") == "256"
    assert page.get_attribute("#lock", "aria-pressed") == "false"
    page.hover(".card")
    page.click(".card .more")
    page.click("#menu >> text=Upscale")
    page.locator("#toast", has_text="ready to be enlarged").wait_for()
    assert page.input_value("#prompt") == made["entry"]["prompt"]
    assert page.input_value("#f-strength") == ""
    lock, kept = page.locator("#lock"), page.locator("#seed-kept")
    assert (lock.get_attribute("aria-pressed"), kept.is_visible()) == ("true", True)
    page.click("#remove")
    assert (lock.get_attribute("aria-pressed"), kept.is_visible()) == ("false", False)
    page.click("#lock")
    page.click("#rows >> text=Vary")
    page.locator("#toast", has_text="ready to be varied").wait_for()
    assert lock.get_attribute("aria-pressed") == "false", "another one, each time"
    page.click("#rows >> text=Upscale")
    page.locator("#toast", has_text="ready to be enlarged").wait_for()
    page.click("#generate")
    page.locator(".card[data-state=done]").nth(1).wait_for()
    newest = ask(page, "GET", "api/jobs")["jobs"][0]
    assert (newest["entry"]["width"], newest["entry"]["height"]) == (512, 512)
    assert newest["image_name"] == "your image"
    # Its settings come back with the image that it enlarged.
    unfold(page)
    page.click("#remove")
    act(page, "Use settings")
    page.locator("#uploaded", has_text="your image").wait_for()
    page.locator("#upload-preview").evaluate("image => image.decode()")


def test_both_are_compared_with_a_slider_in_steps(visit):
    page = visit()
    enter(page)
    page.check("input[name=attention][value=both]")
    page.click("#generate")
    viewer = finished(page)
    told = page.inner_text("#rows")
    assert re.search(r"CLEAR .* s · .*FLOP", told)
    assert re.search(r"Full attention .* s · .*FLOP", told)
    assert re.search(r"Denoising with CLEAR took .* fewer FLOPs", page.inner_text("#gain"))
    slider, over = viewer.locator("#slider"), viewer.locator(".pane.over")
    slider.wait_for()
    slider.focus()
    for key, value in (
        *(("ArrowRight", "51"), ("ArrowLeft", "50"), ("ArrowUp", "51"), ("PageDown", "41")),
        *(("PageUp", "51"), ("End", "100"), ("Home", "0")),
    ):
        slider.press(key)
        assert slider.input_value() == value
    shown = over.evaluate("pane => pane.style.clipPath")
    assert float(re.findall(r"([\d.]+)px\)", shown)[0]) < 20, "the right image is all shown"
    assert viewer.locator("#left").is_hidden(), "of which nothing is seen"
    line = viewer.locator("#line").bounding_box()
    page.mouse.move(line["x"] + line["width"] / 2, line["y"] + 100)
    page.mouse.down()
    page.mouse.move(line["x"] + line["width"] / 2 + 150, line["y"] + 120, steps=4)
    page.mouse.up()
    assert 5 < int(slider.input_value()) < 60, "the line is dragged as its knob is"
    assert viewer.locator("#left").is_visible()


def test_two_that_are_compared_move_together_wherever_they_are_held(visit):
    page = visit()
    one, other = make_image(page, seed=1), make_image(page, seed=2)
    page.goto(f"{page.url}view/{one['id']}?with={other['id']}")
    both = "() => window.viewers?.every(viewer => viewer.world.getItemAt(0)?.getFullyLoaded())"
    page.wait_for_function(both)
    seen = """() => window.viewers.map(({ viewport }) => {
        const { x, y } = viewport.getCenter(true);
        return [viewport.getZoom(true), x, y].map(value => value.toFixed(6)).join(" "); })"""
    before = page.evaluate(seen)[0]
    width = page.viewport_size["width"]
    for across in (width * 3 // 4, width // 4):
        page.mouse.move(across, 300)
        for motion in ("wheel", "drag"):
            if motion == "wheel":
                page.mouse.wheel(0, -300)
            else:
                page.mouse.down()
                page.mouse.move(across + 60, 340, steps=5)
            for _ in range(8):  # while it moves, too
                page.wait_for_timeout(60)
                first, second = page.evaluate(seen)
                assert first == second
            page.mouse.up()
            page.wait_for_timeout(1000)
            first, second = page.evaluate(seen)
            assert first == second != before, f"{motion} at {across}"
            before = first


def test_a_finger_scrolls_the_page_until_the_image_is_zoomed_in(visit):
    page = visit(size="phone")
    for seed in range(3):
        made = make_image(page, seed=seed)
    page.click(f".card[data-job='{made['id']}'] .open")
    finished(page).locator("canvas").first.wait_for()
    frame = next(frame for frame in page.frames if "/view/" in frame.url)
    frame.wait_for_function("() => window.viewers?.[0].world.getItemAt(0)?.getFullyLoaded()")
    page.evaluate("scrollTo(0, 0)")
    devtools = page.context.new_cdp_session(page)

    def touch(*ways):
        """Fingers, each on its way: (x, from y, to y)."""
        for step in range(9):
            points = [
                {"x": x, "y": start + (end - start) * step / 8, "id": finger}
                for finger, (x, start, end) in enumerate(ways)
            ]
            kind = "touchMove" if step else "touchStart"
            devtools.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
            page.wait_for_timeout(30)
        devtools.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        page.wait_for_timeout(1000)

    seen = """() => { const { viewport } = window.viewers[0]; const { x, y } = viewport.getCenter();
        return [viewport.getZoom(), x, y].map(value => Math.round(1000 * value)); }"""
    before = frame.evaluate(seen)
    touch((195, 300, 150))
    assert page.evaluate("scrollY") > 80
    assert frame.evaluate(seen) == before
    page.evaluate("scrollTo(0, 0)")
    touch((195, 220, 120), (195, 260, 380))
    assert frame.evaluate(seen)[0] > 1.5 * before[0], "two fingers zoom"
    assert page.evaluate("visualViewport.scale") == 1, "the image, not the page"
    assert page.evaluate("scrollY") == 0
    before = frame.evaluate(seen)
    touch((195, 300, 150))
    assert page.evaluate("scrollY") == 0
    assert frame.evaluate(seen) != before, "and then a finger moves the image"


def test_the_wheel_scrolls_the_page_until_the_image_is_zoomed_in(visit):
    page = visit(size="desktop")
    make_image(page)
    finished(page).locator("canvas").first.wait_for()
    frame = next(frame for frame in page.frames if "/view/" in frame.url)
    frame.wait_for_function("() => window.viewers?.[0].world.getItemAt(0)?.getFullyLoaded()")
    zoom = "() => Math.round(1000 * window.viewers[0].viewport.getZoom())"
    home = "() => Math.round(1000 * window.viewers[0].viewport.getHomeZoom())"
    large = frame.evaluate(zoom)
    page.set_viewport_size({"width": 1280, "height": 500})
    page.wait_for_timeout(500)
    assert large > frame.evaluate(zoom) == frame.evaluate(home), "it stays whole"
    page.mouse.move(800, 200)

    def turn(pixels):
        page.mouse.wheel(0, pixels)
        page.wait_for_timeout(1000)
        return frame.evaluate(zoom), page.evaluate("scrollY")

    whole = frame.evaluate(zoom)
    assert turn(40) == (whole, 40)
    assert turn(-40) == (whole, 0), "back up the page"
    nearer, scrolled = turn(-120)
    assert (nearer > whole, scrolled) == (True, 0)
    assert turn(120) == (whole, 0)
    assert turn(40) == (whole, 40)


def test_two_images_of_one_shape_are_compared(visit):
    page = visit()
    one = make_image(page, seed=1)
    make_image(page, seed=2, width=512, height=512)
    make_image(page, seed=3, width=512)
    page.click(f".card[data-job='{one['id']}'] .open")
    page.click(".card .more >> nth=0")
    page.locator("#menu >> text=Delete").wait_for()
    assert page.locator("#menu >> text=Compare").count() == 0, "another shape"
    page.keyboard.press("Escape")
    page.click(".card .more >> nth=1")
    page.click("#menu >> text=Compare with the opened image")
    viewer = page.frame_locator("#stage .viewer")
    viewer.locator("#right", has_text="512 × 512 · seed 2").wait_for()
    assert "256 × 256 · seed 1" in viewer.locator("#left").inner_text()
    page.click("#close-comparison")
    page.locator("#close-comparison").wait_for(state="hidden")
    # The other way about: of the opened one, with which it may be compared.
    act(page, "Compare with…")
    page.click("#menu >> text=512 × 512 · seed 2")
    viewer.locator("#right", has_text="512 × 512 · seed 2").wait_for()
    page.click("#close-comparison")
    page.hover(".card:has([aria-current])")
    page.click(".card:has([aria-current]) .more")
    page.click("#menu >> text=Compare with…")
    assert page.locator("#menu .item").count() == 1, "of one shape only"
    page.keyboard.press("Escape")
    assert "with" not in page.get_attribute("#stage .viewer", "src")


def test_zoom_into_a_large_image_by_tiles(visit):
    page = visit(reduced_motion="reduce")  # on its way to the zoom it would see others
    tiles = []
    page.on("response", lambda one: tiles.append(one.url) if ".jpg" in one.url else None)
    generate(page, width=2048, height=512)
    finished(page).locator("canvas").first.wait_for()
    frame = next(frame for frame in page.frames if "/view/" in frame.url)
    frame.wait_for_function("() => window.viewers?.[0].world.getItemAt(0)?.getFullyLoaded()")
    assert not any("/11/" in url for url in tiles), "the whole image's pixels are not sent"
    frame.click("#one")
    frame.locator("#zoom", has_text="100%").wait_for()
    frame.wait_for_function("() => window.viewers[0].world.getItemAt(0).getFullyLoaded()")
    sharp = {url for url in tiles if "/clear/11/" in url}
    assert 0 < len(sharp) < 4, "only tiles that are seen"
