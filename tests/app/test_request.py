"""What visitors enter is refused in words for them before anything is queued."""

from dataclasses import replace
from pathlib import Path

import pytest

from clear_dit.app.request import SHAPES, SIDES, VARIANTS, Entry, make_requests, preset_size
from clear_dit.app.settings import Settings, parse_auth
from clear_dit.errors import RequestError
from clear_dit.generation.weights import settled

GOOD = Entry("a house", 256, 256, "clear", 8, 1, None, 4, 2.0, 0, "demo")
SETTINGS = Settings(models=("demo",), out=Path("out"), max_pixels=8192 * 8192, device="cpu")


def test_one_request_or_two_to_compare():
    (request,) = make_requests(GOOD, SETTINGS)
    assert (request.attention, request.radius, request.steps) == ("clear", 8, 4)
    clear, full = make_requests(replace(GOOD, attention="both"), SETTINGS)
    assert (clear.attention, full.attention) == ("clear", "full")
    assert clear.seed == full.seed


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_of_the_page_is_a_request(name):
    down_factor, far = VARIANTS[name]
    (request,) = make_requests(replace(GOOD, down_factor=down_factor, far=far), SETTINGS)
    assert (request.down_factor, request.far) == (down_factor, far)
    assert settled(request).far is (name == "Sees all")  # the demo has local weights for radius 8


def test_without_weights_the_page_sees_all():
    (request,) = make_requests(replace(GOOD, radius=5), SETTINGS)
    assert settled(request) == (None, True)


def test_lines_of_a_prompt_become_one():
    (request,) = make_requests(replace(GOOD, prompt=" a\nhouse \t here "), SETTINGS)
    assert request.prompt == "a house here"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": "  "}, "prompt is empty"),
        ({"prompt": None}, "must be text"),
        ({"prompt": "x" * 2001}, "at most 2000 characters"),
        ({"prompt": "a\0b"}, "control character"),
        ({"width": None}, "Width must be a number"),
        ({"width": 250}, "the nearest are 240 and 256"),
        ({"height": -16}, "Height must be from 16"),
        ({"height": 1e9}, "Height must be from 16"),
        ({"width": 16384, "height": 16384}, "at most 67,108,864"),
        ({"width": 8192, "height": 8192, "attention": "full"}, "Full attention is offered"),
        ({"attention": "none"}, "Attention must be"),
        ({"radius": 0}, "Radius must be from 1"),
        ({"radius": 2.5}, "whole number"),
        ({"down_factor": 32}, "down_factor must not exceed"),
        ({"far": 1}, "Far must be true, false or null; got 1"),
        ({"far": True, "down_factor": 2}, "far and down-factor 2 exclude each other"),
        ({"steps": 101}, "Steps must be from 1 to 100"),
        ({"steps": float("nan")}, "Steps must be"),
        ({"guidance": "much"}, "Guidance must be a number"),
        ({"seed": True}, "Seed must be a number"),
        ({"seed": -1}, "Seed must be from 0"),
        ({"model": "/etc"}, "Model must be one of demo"),
    ],
)
def test_refused_by_name(change, words):
    with pytest.raises(RequestError, match=words) as error:
        make_requests(replace(GOOD, **change), SETTINGS)
    assert "--" not in str(error.value)


def test_presets_are_whole_tokens_with_the_longer_side_given():
    for side in SIDES:
        for shape, (across, down) in SHAPES.items():
            width, height = preset_size(side, shape, 16)
            assert max(width, height) == side
            assert width % 16 == height % 16 == 0
            assert abs(width / height - across / down) < 0.05 * across / down


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"models": ()}, "--model"),
        ({"models": ("no such",)}, "--model"),
        ({"port": 70000}, "--port"),
        ({"max_pixels": 1}, "--max-pixels"),
        ({"queue_size": 0}, "--queue-size"),
        ({"keep_days": 0}, "--keep-days"),
    ],
)
def test_settings_are_refused_by_name(change, words):
    with pytest.raises(RequestError, match=words):
        replace(SETTINGS, **change)


def test_only_this_machine_by_default():
    assert SETTINGS.host == "127.0.0.1"
    assert SETTINGS.local
    assert replace(SETTINGS, host="::1").local
    assert not replace(SETTINGS, host="0.0.0.0").local
    assert parse_auth("a:b:c") == ("a", "b:c")
    with pytest.raises(RequestError, match="NAME:PASSWORD"):
        parse_auth("a")
