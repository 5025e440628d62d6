"""What a call of a cascade lets others run in the middle of it finds the model as it is outside.

Half of the time the call's stage has full attention, the original weights and extended positions.
"""

import copy

import pytest
import torch
from conftest import make_components, make_inputs
from diffusers import FluxPipeline
from safetensors.torch import load_file
from support.families.models import run
from support.slow import slow

from clear_dit import (
    CLEARFluxPipeline,
    apply_clear,
    load_clear_weights,
    remove_clear,
    save_clear_weights,
)
from clear_dit.pipelines.cascade.resolution import Resolution

LOCAL = {"radius": 2, "far": False}


@pytest.fixture
def pipe(weights):
    pipe = CLEARFluxPipeline(**make_components(), native_size=32)
    pipe.set_progress_bar_config(disable=True)
    apply_clear(pipe, **LOCAL, weights=weights)
    return pipe


def stock_of(pipe):
    parts = {name: part for name, part in pipe.components.items() if name != "native_size"}
    stock = FluxPipeline(**parts | {"scheduler": copy.deepcopy(pipe.scheduler)})
    stock.set_progress_bar_config(disable=True)
    return stock


def draw(pipe, height=64, width=64, **options):
    usual = {"num_inference_steps": 2, "max_sequence_length": 8, "output_type": "pt"}
    generator = torch.Generator().manual_seed(0)
    size = {"height": height, "width": width, "generator": generator}
    return pipe("a house", **usual | size | options).images


def draw_meanwhile(pipe, act):
    """An image, and what `act` returned after each of its steps."""
    found = []
    image = draw(pipe, callback_on_step_end=lambda *_: found.append(act()) or {})
    return image, found


INNER = {
    "a cascade": draw,
    "one stage": lambda pipe: draw(pipe, 32, 64),
    "a stock pipeline": lambda pipe: draw(stock_of(pipe), 64, 32),
    "a forward": lambda pipe: run(pipe.transformer, make_inputs(4, 6)),
}


@slow
@pytest.mark.parametrize(
    ("inner", "with_weights"), [*((name, True) for name in INNER), ("a forward", False)]
)
def test_images_of_a_callback(pipe, inner, with_weights):
    inner = INNER[inner]
    if not with_weights:
        remove_clear(pipe)
        apply_clear(pipe, **LOCAL)
    expected, expected_inside = draw(pipe), inner(pipe)
    image, inside = draw_meanwhile(pipe, lambda: inner(pipe))
    assert torch.equal(image, expected)
    assert len(inside) > 2
    for found in inside:
        assert torch.equal(found, expected_inside)
    assert torch.equal(draw(pipe), expected)


def test_images_of_a_callback_with_a_fused_lora(pipe):
    from peft import LoraConfig

    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.transformer.add_adapter(lora)
    pipe.fuse_lora(components=["transformer"])
    pipe.unload_lora_weights()
    expected = draw(pipe)
    image, inside = draw_meanwhile(pipe, lambda: draw(pipe))
    for found in (image, *inside):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_weights_saved_in_a_callback(pipe, weights, tmp_path):
    path = tmp_path / "saved.safetensors"
    before = load_file(weights)

    def saved():
        save_clear_weights(pipe, path)
        return load_file(path)

    for found in draw_meanwhile(pipe, saved)[1]:
        assert all(torch.equal(value, before[key]) for key, value in found.items())


CHANGES = {
    "remove": lambda pipe, path: remove_clear(pipe),
    "apply": lambda pipe, path: apply_clear(pipe, radius=3),
    "load": load_clear_weights,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_stage_with_the_original_weights_cannot_be_changed(pipe, weights, change):
    expected, tuned = draw(pipe), copy.deepcopy(pipe.transformer.state_dict())
    with pytest.raises(RuntimeError, match=r"stage of full attention .* before or after the call"):
        draw_meanwhile(pipe, lambda: change(pipe, weights))
    for key, value in pipe.transformer.state_dict().items():
        assert torch.equal(value, tuned[key]), key
    assert torch.equal(draw(pipe), expected)
    change(pipe, weights)


def test_positions_stay_when_clear_goes(pipe):
    """They are the call's. Forwards under CLEAR go before, forwards of full attention follow."""
    remove_clear(pipe)
    spread = Resolution(rope="interpolation", rope_factors=(3.0, 3.0))
    options = {"cascade": False, "resolution": lambda height, width: spread}
    expected = draw(pipe, **options)
    apply_clear(pipe, radius=100, far=False)

    def remove(*_):
        remove_clear(pipe)
        return {}

    image = draw(pipe, **options, callback_on_step_end=remove)
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-5)
