"""Numbers of Python, numpy and torch: taken as Python's own, or refused, everywhere the same."""

import json
import math
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_components
from diffusers import FluxPipeline
from PIL import Image

from clear_dit import (
    CLEARFluxPipeline,
    CLEARProcessor,
    Window,
    apply_clear,
    local_attention,
)
from clear_dit.app.entry import make_entry, make_requests
from clear_dit.app.settings import Settings
from clear_dit.chunking import chunk_feed_forward
from clear_dit.distillation.options import DistillOptions
from clear_dit.distillation.sample import make_request as make_sample_request
from clear_dit.errors import RequestError
from clear_dit.evaluation.request import make_evaluate_request
from clear_dit.generation.request import make_request
from clear_dit.kernels.numbers import as_integer, as_number
from clear_dit.pipelines.cascade.resolution import Resolution
from clear_dit.pipelines.decoding.autoencoder import decode
from clear_dit.render.fields import check_values

SETTINGS = Settings(models=("demo",), out=Path("out"), device="cpu")
WHOLE = {
    "numpy integer": np.int64,
    "numpy unsigned": np.uint16,
    "float": float,
    "numpy float": np.float32,
    "0-dimensional array": np.array,
    "tensor": torch.tensor,
    "float tensor": lambda value: torch.tensor(float(value)),
    "fraction": Fraction,
    "decimal": Decimal,
}
NOT_WHOLE = {
    "True": True,
    "numpy's True": np.True_,
    "torch's True": torch.tensor(True),
    "nan": math.nan,
    "infinity": np.float32("inf"),
    "1e30": 1e30,
    "fraction": 16.5,
    "numpy fraction": np.float64(32.25),
    "text": "32",
    "list": [32],
    "tensor of one": torch.tensor([32]),
    "complex": 32 + 0j,
    "duration": np.timedelta64(32, "s"),
    "decimal NaN": Decimal("sNaN"),
    "beyond floats": Fraction(10**400, 3),
    "without values": torch.tensor(32, device="meta"),
    "masked": np.ma.masked,
    "text in an array": np.array("32"),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_whole_numbers_become_ints(kind):
    found = as_integer(WHOLE[kind](32))
    assert type(found) is int
    assert found == 32


@pytest.mark.parametrize("kind", NOT_WHOLE)
def test_what_is_no_whole_number(kind):
    assert as_integer(NOT_WHOLE[kind]) is None


def test_other_numbers():
    for value in (0.5, np.float32(0.5), torch.tensor(0.5, dtype=torch.bfloat16), Fraction(1, 2)):
        assert as_number(value) == 0.5
        assert type(as_number(value)) is float
    assert as_integer(10**30) == 10**30
    for value in (False, np.False_, "0.5", None, math.inf, torch.tensor(math.nan), 1j):
        assert as_number(value) is None


def plain(value):
    """Whether there is nothing but Python's own in it."""
    if isinstance(value, (tuple, list)):
        return all(map(plain, value))
    return value is None or type(value) in (int, float, str, bool)


@pytest.mark.parametrize("kind", WHOLE)
def test_settings_of_attention(kind):
    two, four = WHOLE[kind](2), WHOLE[kind](4)
    processor = CLEARProcessor(two, two, grid=(four, four), proportional_base=four)
    assert repr(processor) == repr(CLEARProcessor(2, 2, grid=(4, 4), proportional_base=4))
    assert plain(list(processor.settings.values()))
    window = Window(four, four, two, two, two)
    assert repr(window) == repr(Window(4, 4, 2, 2, 2))
    resolution = Resolution("ntk", (two, four), four, two, proportional_base=four)
    assert repr(resolution) == repr(Resolution("ntk", (2.0, 4.0), 4, 2.0, proportional_base=4))
    window = Window(4, 4, 4, 2, local_references=((two, two),))
    assert repr(window) == repr(Window(4, 4, 4, 2, local_references=((2, 2),)))
    assert repr(Window(4, 4, 0, 2, query_rows=(two, four)).query_rows) == "(2, 4)"


@pytest.mark.parametrize("kind", NOT_WHOLE)
def test_refused_everywhere(kind):
    value = NOT_WHOLE[kind]
    with pytest.raises(ValueError, match="CLEARProcessor: radius must be an integer"):
        CLEARProcessor(radius=value)
    with pytest.raises(ValueError, match="CLEARProcessor: grid rows must be an integer"):
        CLEARProcessor(grid=(value, 4))
    with pytest.raises(TypeError, match="Window: radius must be an int"):
        Window(4, 4, 0, value)
    with pytest.raises(TypeError, match="Window: query_rows must be an int"):
        Window(64, 4, 0, 2, query_rows=(0, value))
    with pytest.raises(ValueError, match="trained_side must be an integer"):
        Resolution(trained_side=value)
    with pytest.raises(ValueError, match="rope factors must be two positive numbers"):
        Resolution(rope_factors=value)
    for name in ("port", "max_pixels", "queue_size"):
        with pytest.raises(RequestError, match=f"--{name.replace('_', '-')} must be "):
            replace(SETTINGS, **{name: value})
    with pytest.raises(ValueError, match="chunk_feed_forward: tokens must be an integer"):
        chunk_feed_forward(None, tokens=value)
    for name in ("steps", "radius", "height", "seed", "down_factor"):
        with pytest.raises(RequestError, match=f"--{name.replace('_', '-')} must be "):
            make_request("a house", device="cpu", **{name: value})


@pytest.fixture(scope="module")
def pipe():
    pipe = CLEARFluxPipeline(**make_components(), native_size=np.int64(32))
    pipe.set_progress_bar_config(disable=True)
    apply_clear(pipe, radius=np.int64(32))
    assert type(pipe.config.native_size) is int
    return pipe


SIZE = {"height": 32, "width": 32, "num_inference_steps": 2, "max_sequence_length": 8}


def draw(pipe, **options):
    generator = torch.Generator().manual_seed(0)
    return pipe("a house", generator=generator, output_type="pt", **SIZE | options).images


@pytest.mark.parametrize("kind", ["numpy integer", "float", "tensor", "fraction"])
def test_calls_of_pipelines(pipe, kind):
    """The image is that of stock with Python's numbers."""
    stock = FluxPipeline(**make_components())
    stock.set_progress_bar_config(disable=True)
    numbers = {name: WHOLE[kind](value) for name, value in SIZE.items()}
    scales = {"negative_prompt": "sea", "true_cfg_scale": 2, "guidance_scale": 3}
    given = {
        name: WHOLE[kind](value) for name, value in scales.items() if name != "negative_prompt"
    }
    sizes = []

    def look(pipe, step, timestep, tensors):
        sizes.append((pipe.stage.height, pipe.stage.width))
        return {}

    given |= {"num_images_per_prompt": WHOLE[kind](1), "callback_on_step_end": look}
    found = draw(pipe, negative_prompt="sea", **numbers, **given)
    assert repr(sizes) == "[(32, 32), (32, 32)]"
    torch.testing.assert_close(found, draw(stock, **scales), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [*SIZE, "num_images_per_prompt"])
@pytest.mark.parametrize("kind", NOT_WHOLE)
def test_calls_of_pipelines_are_refused_before_any_work(pipe, name, kind, monkeypatch):
    for part in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2):
        monkeypatch.setattr(part, "forward", None)
    with pytest.raises(ValueError, match=f"CLEARPipeline: {name} must be "):
        draw(pipe, **{name: NOT_WHOLE[kind]})


@pytest.mark.parametrize("value", [True, np.False_, "1", math.nan, math.inf, [0.5, "x"]])
@pytest.mark.parametrize(
    "name", ["true_cfg_scale", "guidance_scale", "low_resolution_guidance", "strength"]
)
def test_scales_are_refused_before_any_work(pipe, name, value, monkeypatch):
    for part in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2):
        monkeypatch.setattr(part, "forward", None)
    with pytest.raises(ValueError, match=f"CLEARPipeline: {name} "):
        draw(pipe, **{"height": 64, "width": 32, name: value})


@pytest.mark.parametrize("value", [-0.5, np.float32(1.5), 2])
def test_numbers_out_of_their_range(pipe, value):
    for name in ("low_resolution_guidance", "strength"):
        with pytest.raises(ValueError, match=f"CLEARPipeline: {name} must be from 0 to 1, got"):
            draw(pipe, **{"height": 64, "width": 64, name: value})
    with pytest.raises(RequestError, match="--strength must be from 0 to 1, got"):
        make_request("a house", device="cpu", strength=[value])
    with pytest.raises(RequestError, match="--guidance must be from 0 to 100, got"):
        make_request("a house", device="cpu", guidance=value * 100 if value > 0 else value)


@pytest.mark.parametrize("zero", [0, np.int64(0), 0.0])
def test_no_pixels_are_the_native_size(pipe, zero):
    """As in stock."""
    assert torch.equal(draw(pipe, height=zero, width=zero), draw(pipe))


@pytest.mark.parametrize("make", [np.float32, lambda value: torch.tensor(value).bfloat16()])
def test_strengths_of_a_cascade(pipe, make):
    size = {"height": 64, "width": 64}
    expected = draw(pipe, strength=0.5, low_resolution_guidance=0.25, **size)
    for strength in (make(0.5), [make(0.5)], np.array([0.5]), torch.tensor([0.5])):
        found = draw(pipe, strength=strength, low_resolution_guidance=make(0.25), **size)
        assert torch.equal(found, expected)


def test_noise_levels_and_a_stage_folder(pipe, tmp_path):
    """What determines an image is told apart by its value, not by its type."""
    expected = draw(pipe, sigmas=[1.0, 0.5], num_inference_steps=None, stages_dir=tmp_path)
    for sigmas in (np.array([1.0, 0.5]), [np.float32(1), np.float32(0.5)], torch.tensor([1, 0.5])):
        found = draw(pipe, sigmas=sigmas, num_inference_steps=None, stages_dir=tmp_path)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["numpy unsigned", "float tensor"])
def test_tiles_and_chunks(pipe, kind):
    latents = torch.randn(1, 1, 8, 8)
    expected = decode(pipe.vae, latents, tile_pixels=8)
    assert torch.equal(decode(pipe.vae, latents, tile_pixels=WHOLE[kind](8)), expected)
    chunk_feed_forward(pipe, WHOLE[kind](8))
    chunk_feed_forward(pipe, None)


@pytest.mark.parametrize("kind", ["fraction", "decimal", "tensor", "numpy float"])
def test_scales_of_local_attention(kind):
    q, window = torch.randn(1, 16, 1, 8), Window(4, 4, 0, 2)
    expected = local_attention(q, q, q, window, scale=2.0)
    assert torch.equal(local_attention(q, q, q, window, scale=WHOLE[kind](2)), expected)
    for value in (True, "2", [2], math.inf * torch.ones(())):
        with pytest.raises(ValueError, match="local_attention: scale must be a finite number"):
            local_attention(q, q, q, window, scale=value)


def test_messages_tell_text_from_numbers(pipe):
    for make in (partial(draw, pipe), partial(make_request, "a house", device="cpu")):
        with pytest.raises(ValueError, match=r"height must be a .*multiple of .* got '32'"):
            make(height="32")


def test_one_strength_need_not_be_in_a_tuple():
    assert make_request("a house", device="cpu", strength=np.float32(0.5)).strength == (0.5,)


@pytest.mark.parametrize("kind", WHOLE)
def test_requests(kind, tmp_path):
    make = WHOLE[kind]
    size = {"height": make(64), "width": make(32), "steps": make(2), "device": "cpu"}
    request = make_request("a house", radius=make(2), seed=make(7), guidance=make(2), **size)
    expected = make_request(
        "a house", radius=2, seed=7, guidance=2.0, height=64, width=32, steps=2, device="cpu"
    )
    assert repr(request) == repr(expected)
    image = tmp_path / "image.png"
    Image.new("RGB", (64, 64)).save(image)
    larger = make_request("a house", image=str(image), height=make(128), device="cpu")
    assert plain([larger.height, larger.width])
    assert (larger.height, larger.width) == (128, 128)
    sample = make_sample_request("demo", "demo", make(3), batch=make(2), **size)
    assert plain([sample.count, sample.batch, sample.height, sample.seed])
    evaluate = make_evaluate_request(
        "demo", "demo", make(2), radii=[make(3)], batch=make(2), **size
    )
    assert plain([evaluate.batch, evaluate.variants[1].radius])
    assert (
        evaluate.variants[1].label
        == make_evaluate_request(
            "demo", "demo", 2, radii=[3], batch=2, height=64, width=32, steps=2, device="cpu"
        )
        .variants[1]
        .label
    )
    options = DistillOptions("demo", tmp_path, tmp_path / "out", radius=make(3), ema_decay=make(1))
    assert plain([options.radius, options.ema_decay])
    with pytest.raises(RequestError, match="--radius must be from 1 to"):
        replace(options, radius=make(0))


@pytest.mark.parametrize("kind", NOT_WHOLE)
def test_requests_are_refused(kind, tmp_path):
    value = NOT_WHOLE[kind]
    with pytest.raises(RequestError, match="--count must be "):
        make_sample_request("demo", "demo", value, device="cpu")
    with pytest.raises(RequestError, match="--count must be "):
        make_evaluate_request("demo", "demo", value, device="cpu")
    with pytest.raises(RequestError, match="--max-train-steps must be "):
        DistillOptions("demo", tmp_path, tmp_path / "out", radius=3, max_train_steps=value)
    with pytest.raises(RequestError, match="steps must be an integer"):
        check_values({"prompt": "a", "steps": value})
    entry = make_entry({"prompt": "a", "width": 64, "height": 64, "steps": value}, SETTINGS)
    with pytest.raises(RequestError, match="Steps must be "):
        make_requests(entry, SETTINGS)


def test_json_of_the_page_and_of_job_files():
    text = '{"prompt": "a", "height": 64.0, "steps": 2.0, "seed": 7, "guidance": 2}'
    values = check_values(json.loads(text))
    assert repr(values) == ("{'prompt': 'a', 'height': 64, 'steps': 2, 'seed': 7, 'guidance': 2.0}")
    given = {"prompt": "a", "width": 64.0, "height": 64.0, "radius": 8.0, "down_factor": 1.0}
    entry = make_entry(given | {"steps": 2.0, "guidance": 2, "seed": 7.0}, SETTINGS)
    whole = replace(entry, width=64, height=64, radius=8, down_factor=1, steps=2, seed=7)
    assert repr(make_requests(entry, SETTINGS)) == repr(make_requests(whole, SETTINGS))
