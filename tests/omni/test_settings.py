"""What there is of the backend for vLLM-Omni without vLLM-Omni."""

import logging
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from clear_dit.attention.layout import Layout
from clear_dit.errors import RequestError
from clear_dit.vllm_omni import layouts, register
from clear_dit.vllm_omni.settings import VARIABLE, Settings

ROOT = Path(__file__).parents[2]


def test_the_entry_point_is_the_one_that_registers():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    group = "vllm_omni.general_plugins"
    assert project["entry-points"][group] == {"clear_dit": "clear_dit.vllm_omni:register"}
    (value,) = project["entry-points"][group].values()
    assert EntryPoint("clear_dit", value, group).load() is register


def test_another_vllm_omni_goes_on_without_the_backend(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "aenum", None)
    with caplog.at_level(logging.WARNING, logger="clear_dit"):
        register()
    assert "the attention backend CLEAR is not there: this version of vLLM-Omni" in caplog.text


@pytest.mark.parametrize("text", ["", " ", "{}"])
def test_defaults(monkeypatch, text):
    monkeypatch.setenv(VARIABLE, text)
    assert Settings.of_environment() == Settings(16, True, "auto")
    monkeypatch.delenv(VARIABLE)
    assert Settings.of_environment().far_levels == 10


def test_what_is_said_is_taken(monkeypatch):
    monkeypatch.setenv(VARIABLE, '{"radius": 1, "far": false, "impl": "flex"}')
    assert Settings.of_environment() == Settings(1, False, "flex")
    assert Settings.of_environment().far_levels == 0


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("radius=8", "must be a JSON object of radius, far, impl, such as"),
        ("[8]", "must be a JSON object"),
        ('{"raduis": 8}', "must be a JSON object"),
        ('{"radius": 1}', "radius must be an integer of 2 or more with far keys, got 1."),
        ('{"radius": 0, "far": false}', "radius must be an integer of 1 or more, got 0."),
        ('{"radius": 8.5}', "radius must be an integer"),
        ('{"radius": "8"}', "radius must be an integer"),
        ('{"radius": true}', "radius must be an integer"),
        ('{"far": "yes"}', "far must be true or false, got 'yes'."),
        (
            '{"impl": "fast"}',
            "impl must be one of auto, triton, flex, tiled, reference; got 'fast'",
        ),
        ('{"impl": ["flex"]}', "impl must be one of"),
    ],
)
def test_bad_settings_are_refused_in_one_line(monkeypatch, text, told):
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(RequestError) as caught:
        Settings.of_environment()
    said = str(caught.value)
    assert said.startswith(VARIABLE)
    assert told in said
    assert "\n" not in said


def test_qwen_images_shapes():
    text = torch.zeros(2, 5, 8)
    for shapes in ([[(1, 6, 7)]], [[(1, 6, 7)], [(1, 6, 7)]], [(1, 6, 7)]):
        given = {"img_shapes": shapes, "encoder_hidden_states": text}
        assert layouts.from_shapes(given) == Layout(5, 6, 7)


def test_a_layout_holds_while_the_transformer_is_at_work():
    class Transformer:
        def forward(self, txt_ids, img_ids=None):
            seen.append(layouts.current_layout())
            if len(txt_ids) == 1:
                raise RuntimeError("stopped")

    seen = []
    Transformer.forward = layouts._telling(Transformer.forward, layouts.from_ids)
    ids = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]])
    Transformer().forward(torch.zeros(3, 3), img_ids=ids)
    with pytest.raises(RuntimeError, match="stopped"):
        Transformer().forward(torch.zeros(1, 3), ids)
    assert seen == [Layout(3, 2, 2), Layout(1, 2, 2)]
    assert layouts.current_layout() is None
