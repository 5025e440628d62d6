"""Generating by the page: a queue of cards, each followed and cancelled by itself."""

import re

from support.slow import slow
from support.web_page import (
    act,
    ask,
    enter,
    finished,
    generate,
    job,
    make_image,
    pretend_jobs,
    unfold,
)

pytestmark = slow


def states(page):
    """Of all cards, in their order."""
    return page.locator(".card").evaluate_all("cards => cards.map(card => card.dataset.state)")


def test_an_image_is_generated_with_progress_and_preview_while_others_queue_up(visit):
    page = visit()
    generate(page, steps=30)
    page.wait_for_selector("#stage .preview")
    percent = page.locator("#progress")
    first = int(percent.get_attribute("aria-valuenow"))
    # A second click adds one; nothing is cancelled.
    unfold(page)
    page.click("#generate")
    waiting = page.locator(".card[data-state=waiting]")
    waiting.wait_for()
    assert "place 1 of 1" in waiting.inner_text()
    assert page.locator(".card[data-state=running]").count() == 1
    page.locator("#toast", has_text="In the queue, place 1").wait_for()
    assert "Generating" in page.inner_text("#state-words"), "what is at work stays opened"
    assert page.locator("#stage .preview").count() == 1
    page.wait_for_function(
        "before => +document.querySelector('#progress').ariaValueNow > before", arg=first
    )
    waiting.locator(".cancel").click()
    waiting.wait_for(state="detached")
    finished(page).locator("canvas").first.wait_for()
    assert states(page) == ["done"]
    assert re.search(r"CLEAR.* s · .*FLOP", page.inner_text("#rows"))


def test_several_images_of_a_click_have_seeds_one_after_the_other(visit):
    page = visit()
    enter(page, steps=1)
    page.check("input[name=images][value='3']")
    page.fill("#f-seed", "41")
    page.click("#generate")
    page.locator(".card").nth(2).wait_for()
    finished(page)
    page.locator(".card[data-state=done]").nth(2).wait_for()
    jobs = ask(page, "GET", "api/jobs")["jobs"]
    assert sorted(job["entry"]["seed"] for job in jobs) == [41, 42, 43]


def test_cancel_asks_when_a_job_has_run_for_long(visit):
    page = visit(jobs=[job(1, state="running", ran=300)])
    cancelled = []
    page.route("**/cancel", lambda route: (cancelled.append(1), route.fulfill(json={})))
    page.click("#cancel")
    page.locator("dialog", has_text="Cancel this image? It has run for 5 min.").wait_for()
    page.click("text=Let it run")
    page.locator("dialog").wait_for(state="detached")
    assert cancelled == []
    page.click(".card .cancel")
    page.keyboard.press("Escape")
    page.locator("dialog").wait_for(state="detached")
    assert cancelled == []
    page.click("#cancel")
    page.click("text=Cancel the image")
    page.locator("#toast", has_text="It had ended already").wait_for()
    assert cancelled == [1]
    pretend_jobs(page, job(2, state="running", ran=20))
    page.locator(".card[data-job$='2']").wait_for()
    page.click("#toast >> text=Close")
    page.click("#cancel")
    page.locator("#toast", has_text="It had ended already").wait_for()
    assert cancelled == [1, 1]
    assert page.locator("dialog").count() == 0


def test_the_question_whether_to_cancel_goes_when_the_image_is_there(visit):
    page = visit(jobs=[job(1, state="running", ran=300)])
    page.click("#cancel")
    page.locator("dialog").wait_for()
    pretend_jobs(page, job(1, state="failed", error="There was not enough memory."))
    page.locator("dialog").wait_for(state="detached")
    page.locator("#toast", has_text="It has ended meanwhile").wait_for()


def test_cancel_is_nowhere_near_generate(visit):
    page = visit(jobs=[job(1, state="running")])
    page.locator("#cancel").wait_for()
    unfold(page)
    go, cancel = (page.locator(one).bounding_box() for one in ("#generate", "#cancel"))
    beside = cancel["x"] - go["x"] - go["width"]
    above = go["y"] - cancel["y"] - cancel["height"]
    assert max(beside, above) > 100


def test_a_cancelled_job_is_gone_and_the_next_one_starts(visit):
    page = visit()
    generate(page, steps=60)
    page.wait_for_selector("#stage .preview")
    page.click("#cancel")
    page.locator("#toast", has_text="Cancelled").wait_for()
    page.locator("#none", has_text="Nothing yet").wait_for()
    generate(page)
    finished(page)
    assert states(page) == ["done"]


def test_a_reload_follows_what_was_opened(visit):
    page = visit()
    one, other = make_image(page, seed=1), make_image(page, seed=2)
    for job_id in (one["id"], other["id"], one["id"]):
        page.click(f".card[data-job='{job_id}'] .open")
        page.reload()
        page.wait_for_selector("#stage .viewer")
        assert job_id in page.get_attribute("#stage .viewer", "src")
        assert page.locator(".card [aria-current]").count() == 1
    generate(page, steps=40)
    page.wait_for_selector(".card[data-state=running]")
    page.reload()
    page.locator("#state[data-state=running]").wait_for()
    page.click("#cancel")
    page.locator(".card[data-state=running]").wait_for(state="detached")


def test_every_tab_has_the_same_news_in_place(visit):
    page = visit()
    other = page.context.new_page()
    other.goto(page.url)
    other.locator("#page").wait_for()
    made = make_image(page)
    card = other.locator(f".card[data-job='{made['id']}']")
    card.and_(other.locator("[data-state=done]")).wait_for()
    card.locator(".open").focus()
    card.evaluate("card => { card.mine = true; }")
    page.click("#favourite")
    other.locator(".card .star[aria-pressed=true]").wait_for()
    make_image(page, seed=9)
    other.locator(".card[data-state=done]").nth(1).wait_for()
    assert card.evaluate("card => card.mine && card.contains(document.activeElement)")
    act(page, "Delete")
    page.click("#toast >> text=Close")
    other.wait_for_function("() => document.querySelectorAll('.card').length == 1")


def test_a_restart_stops_what_ran_and_it_can_be_run_again(visit, app_server):
    page = visit(away=True)
    made = make_image(page)
    generate(page, prompt="a blue house in the hills", steps=60)
    page.wait_for_selector("#stage .preview")
    app_server.stop()
    page.locator("#banner", has_text="does not answer").wait_for()
    generate(page, prompt="a green tree by the sea")
    page.locator("#toast", has_text="Not sent").wait_for()
    app_server.start()
    page.locator("#state-words", has_text="Stopped").wait_for()
    page.locator("#banner").wait_for(state="hidden")
    assert states(page) == ["stopped", "done"]
    assert page.input_value("#prompt") == "a green tree by the sea"
    page.click(".card[data-state=stopped] .again")
    page.locator("#state[data-state=running]").wait_for()
    page.click("#cancel")
    page.locator(".card[data-state=running]").wait_for(state="detached")
    page.click(f".card[data-job='{made['id']}'] .open")
    finished(page).locator("canvas").first.wait_for()


def test_a_failed_job_says_why_and_offers_another_try(visit):
    page = visit(jobs=[job(1, state="failed", error="There was not enough memory.")])
    page.locator("#stage", has_text="There was not enough memory.").wait_for()
    assert page.inner_text("#state-words") == "Failed"
    assert page.locator("#again").is_visible()
    assert page.locator(".card .again").is_visible()


def test_places_and_times_of_a_queue(visit):
    waiting = [job(place, state="waiting", place=place - 1, waiting=2) for place in (2, 3)]
    page = visit(jobs=[job(1, state="running", seconds_left=40.0), *waiting])
    page.locator(".card").nth(2).wait_for()
    assert page.locator(".card .words").all_inner_texts() == [
        "Generating · 40% · about 40 s left",
        "Waiting · place 1 of 2 · about 2 min left",
        "Waiting · place 2 of 2 · about 3 min left",
    ]
    assert page.locator(".card .cancel:visible").count() == 3
    prompts = page.locator(".card .title:visible").all_inner_texts()
    assert prompts == ["a violet tower in the desert"] * 3, "which is which"
