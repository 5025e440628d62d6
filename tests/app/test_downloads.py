"""What files are called where they are saved."""

import re

import pytest

from clear_dit.app.downloads import file_name


def called(prompt, which="clear", kind="png"):
    return file_name(
        {"id": "-_aB3-cdefghijklmnopqr", "entry": {"prompt": prompt, "seed": 7}}, which, kind
    )


def test_by_prompt_and_seed():
    assert called("A violet tower, in the desert!") == "a-violet-tower-in-the-desert-7-aB3cde.png"
    assert called("東京の塔", "full", "webp") == "東京の塔-7-aB3cde-full.webp"


@pytest.mark.parametrize(
    "prompt",
    [
        "../../etc/passwd",
        'a"\r\nset-cookie: b',
        "<img src=x>",
        "...",
        "con",
        "\u202egnp.a",
        "x" * 500,
    ],
)
def test_hostile_prompts_are_words(prompt):
    name = called(prompt)
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*-7-aB3cde\.png", name)
    assert len(name) < 80
