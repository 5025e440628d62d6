"""What visitors enter is refused in words for them before anything is queued."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from clear_dit.app.entry import EntryError, loras, make_entry, make_requests
from clear_dit.app.offer import sizes
from clear_dit.app.settings import Settings, parse_auth
from clear_dit.errors import RequestError
from clear_dit.generation.models import find_model
from clear_dit.generation.weights import settled

SETTINGS = Settings(models=("demo",), out=Path("out"), max_pixels=8192 * 8192, device="cpu")
GOOD = make_entry({"prompt": "a house", "width": 256, "height": 256, "steps": 4}, SETTINGS)
# Of the page: down_factor and far.
VARIANTS = {
    "Auto": (1, None),
    "Sees all": (1, True),
    "Local only": (1, False),
    "Pooled by 2": (2, None),
    "Pooled by 4": (4, None),
}


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


def test_a_small_servers_default_is_what_it_makes():
    small = replace(SETTINGS, max_pixels=300 * 300)
    entry = make_entry({"prompt": "a house"}, small)
    assert (entry.width, entry.height) == (288, 288)
    make_requests(entry, small)
    assert sizes(find_model("demo"), small) == [288]


def test_options_are_fields_to_a_visitor():
    with pytest.raises(EntryError) as error:
        make_requests(replace(GOOD, negative_prompt="blue", guidance=1), SETTINGS)
    told = str(error.value)
    assert told.startswith("Negative prompt acts in guidance's second pass, and guidance 1 has")


def test_lines_of_a_prompt_become_one():
    (request,) = make_requests(replace(GOOD, prompt=" a\nhouse \t here "), SETTINGS)
    assert request.prompt == "a house here"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": "  "}, "Enter a prompt first"),
        ({"prompt": None}, "must be text"),
        ({"prompt": "x" * 2001}, "at most 2,000 characters"),
        ({"prompt": "a\0b"}, "control character"),
        ({"width": None}, "Width must be a whole number"),
        ({"width": 250}, "the nearest are 240 and 256"),
        ({"height": -16}, "Height must be from 16"),
        ({"height": 1e9}, "Height must be from 16"),
        ({"width": 16384, "height": 16384}, "at most 67,108,864"),
        ({"width": 8192, "height": 8192, "attention": "full"}, "Full attention is offered"),
        ({"attention": "none"}, "Attention must be"),
        ({"radius": 0}, "Radius must be from 1"),
        ({"radius": 2.5}, "whole number"),
        ({"down_factor": 32}, "must not exceed"),
        ({"far": 1}, "Far must be true, false or null"),
        ({"far": True, "down_factor": 2}, "Seeing all and pooling exclude"),
        ({"steps": 101}, "Steps must be from 1 to 100"),
        ({"steps": float("nan")}, "Steps must be"),
        ({"guidance": "much"}, "Guidance must be a number"),
        ({"seed": True}, "Seed must be a whole number"),
        ({"seed": -1}, "Seed must be from 0"),
        ({"model": "/etc"}, "Model must be one of demo"),
        ({"strength": 2}, "Strength must be from 0 to 1"),
        ({"negative_prompt": 5}, "Negative prompt must be text"),
        ({"lora": "../secret"}, "LoRA must be one of the server's: none here"),
    ],
)
def test_refused_by_name(change, words):
    with pytest.raises(EntryError, match=words) as error:
        make_requests(replace(GOOD, **change), SETTINGS)
    assert "--" not in str(error.value)
    assert not re.search(r"\b(str|int|float|NoneType)\b|Window:", str(error.value))
    if len(change) == 1 and "down_factor" not in change:
        assert error.value.field == next(iter(change))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, "must be an object"),
        (["a house"], "must be an object"),
        ({"prompt": "a", "weights": "/etc/passwd"}, "has no 'weights'"),
        ({"prompt": "a", "model": "someone/not-there"}, "Model must be one of demo"),
        ({"prompt": "a", "model": ["demo"]}, "Model must be one of demo"),
    ],
)
def test_what_is_no_entry_is_refused(given, words):
    with pytest.raises(EntryError, match=words):
        make_entry(given, SETTINGS)


def test_models_that_are_not_the_servers_are_not_looked_for(monkeypatch):
    def look(*args):
        raise AssertionError(f"looked for {args}")

    monkeypatch.setattr("clear_dit.app.entry.find_model", look)
    for model in ("/etc", "someone/not-there", "..", "demo/", "\0"):
        with pytest.raises(EntryError, match="Model must be one of demo"):
            make_entry({"prompt": "a", "model": model}, SETTINGS)
        with pytest.raises(EntryError, match="Model must be one of demo"):
            make_requests(replace(GOOD, model=model), SETTINGS)


def test_loras_are_those_of_the_servers_folder(tmp_path):
    (tmp_path / "ink.safetensors").touch()
    (tmp_path / "notes.txt").touch()
    server = replace(SETTINGS, loras=tmp_path)
    assert list(loras(server)) == ["ink"]
    with pytest.raises(EntryError, match="LoRA must be one of the server's: ink"):
        make_requests(replace(GOOD, lora=str(tmp_path / "ink")), server)
    with pytest.raises(EntryError, match=r"^Ink\.safetensors is not a safetensors file"):
        make_requests(replace(GOOD, lora="ink"), server)
    with pytest.raises(RequestError, match="--loras: there is no folder"):
        replace(SETTINGS, loras=tmp_path / "none")


def test_every_number_of_a_bad_entry_is_refused():
    for field in ("width", "height", "radius", "steps", "guidance", "seed", "strength"):
        for value in ("12", [], {}, True, float("nan"), float("inf"), -1, 1e300):
            with pytest.raises(EntryError):
                make_requests(replace(GOOD, **{field: value}), SETTINGS)


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
