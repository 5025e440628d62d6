"""IP-adapters, loaded and unloaded before and after CLEAR."""

import copy

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from diffusers.models.transformers.transformer_flux import (
    FluxAttnProcessor,
    FluxIPAdapterAttnProcessor,
)
from safetensors.torch import load_file
from support.ip_adapter import load_ip_adapters as load
from support.models import FAR, assert_differs, assert_same, by_definition, draw, run

from clear_dit import apply_clear, remove_clear, save_clear_weights
from clear_dit.weights.format import pooling_by_key
from clear_dit.weights.learned import make_far_trainable

# Two images as prompt of one sample.
IMAGE_PROMPT = torch.randn(1, 2, 6, generator=torch.Generator().manual_seed(7))


@pytest.fixture
def pipe(tiny_pipeline):
    return tiny_pipeline(FluxPipeline)


@pytest.fixture
def inputs(tiny_inputs):
    return tiny_inputs(4, 6)


def prompted(pipe, inputs, adapters=1):
    prompts = {"ip_adapter_image_embeds": [IMAGE_PROMPT] * adapters}
    return run(pipe.transformer, inputs, joint_attention_kwargs=prompts)


def clear(far, call, *args):
    with by_definition(4, 6, 2, far):
        return call(*args)


def loaded_before(pipe, far=None):
    load(pipe)
    apply_clear(pipe, radius=2, far=far)


def loaded_after(pipe, far=None):
    apply_clear(pipe, radius=2, far=far)
    load(pipe)


orders = pytest.mark.parametrize("order", [loaded_before, loaded_after])


@orders
@pytest.mark.parametrize("far", [False, True])
def test_loaded_used_and_unloaded(pipe, inputs, order, far):
    plain, clear_plain = run(pipe.transformer, inputs), clear(far, run, pipe.transformer, inputs)
    load(pipe)
    full, expected = prompted(pipe, inputs), clear(far, prompted, pipe, inputs)
    assert_differs(full, plain)
    assert_differs(expected, full)
    pipe.unload_ip_adapter()

    order(pipe, far)
    assert_same(prompted(pipe, inputs), expected)
    apply_clear(pipe, radius=FAR, far=far)
    assert_same(prompted(pipe, inputs), full)
    apply_clear(pipe, radius=2, far=far)
    pipe.unload_ip_adapter()
    assert_same(run(pipe.transformer, inputs), clear_plain)
    load(pipe)
    assert_same(prompted(pipe, inputs), expected)


@orders
def test_removing_clear_leaves_the_adapter(pipe, inputs, order):
    load(pipe)
    full = prompted(pipe, inputs)
    order(pipe)
    remove_clear(pipe)  # before any forward
    doubles = [block.attn for block in pipe.transformer.transformer_blocks]
    stock = [attn.processor for attn in doubles]
    assert {type(processor) for processor in stock} == {FluxIPAdapterAttnProcessor}
    assert torch.equal(prompted(pipe, inputs), full)
    apply_clear(pipe, radius=2)
    assert all(a.processor.adapter is p for a, p in zip(doubles, stock, strict=True))
    prompted(pipe, inputs)
    remove_clear(pipe)
    assert [attn.processor for attn in doubles] == stock


@orders
def test_removing_clear_after_the_adapter(pipe, inputs, order):
    plain = run(pipe.transformer, inputs)
    order(pipe)
    prompted(pipe, inputs)
    pipe.unload_ip_adapter()
    remove_clear(pipe)
    assert {type(p) for p in pipe.transformer.attn_processors.values()} == {FluxAttnProcessor}
    assert torch.equal(run(pipe.transformer, inputs), plain)


def test_scale_by_layer_and_by_adapter(pipe, inputs):
    load(pipe, 0, 1)
    scales = [[0.3, 0.9], [0.7, 0.0]]
    pipe.set_ip_adapter_scale(scales)
    expected = clear(True, prompted, pipe, inputs, 2)
    pipe.set_ip_adapter_scale(1.0)
    apply_clear(pipe, radius=2)
    assert_differs(prompted(pipe, inputs, 2), expected)
    pipe.set_ip_adapter_scale(scales)
    assert_same(prompted(pipe, inputs, 2), expected)
    remove_clear(pipe)
    processors = list(pipe.transformer.attn_processors.values())
    assert [processor.scale for processor in processors[:2]] == [[0.3, 0.7], [0.9, 0.0]]


@pytest.mark.parametrize("down_factor", [1, 2], ids=["far", "pooled"])
def test_pooling_weights_survive(pipe, inputs, tmp_path, down_factor):
    apply_clear(pipe, radius=2, down_factor=down_factor)
    if down_factor == 1:
        make_far_trainable(pipe.transformer)
    weights = pooling_by_key(pipe.transformer)
    assert len(weights) == (8 if down_factor == 1 else 4)
    for weight in weights.values():
        weight.data.normal_()
    plain = run(pipe.transformer, inputs)
    load(pipe)
    save_clear_weights(pipe, tmp_path / "loaded.safetensors")  # before any forward
    assert_differs(prompted(pipe, inputs), plain)
    pipe.unload_ip_adapter()
    save_clear_weights(pipe, tmp_path / "unloaded.safetensors")
    assert torch.equal(run(pipe.transformer, inputs), plain)
    again = pooling_by_key(pipe.transformer)
    assert again.keys() == weights.keys()
    assert all(again[key] is weight for key, weight in weights.items())
    loaded, unloaded = (tmp_path / f"{name}.safetensors" for name in ("loaded", "unloaded"))
    assert load_file(loaded).keys() == load_file(unloaded).keys()
    for name, tensor in load_file(loaded).items():
        assert torch.equal(load_file(unloaded)[name], tensor)


def test_copies(pipe, inputs):
    load(pipe)
    apply_clear(pipe, radius=2)
    expected = prompted(pipe, inputs)
    twin = copy.copy(pipe)
    twin.transformer = copy.deepcopy(pipe.transformer)
    pipe.set_ip_adapter_scale(0.0)
    assert torch.equal(prompted(twin, inputs), expected)
    remove_clear(twin)
    assert not torch.equal(prompted(twin, inputs), prompted(pipe, inputs))


def test_without_an_image_prompt(pipe, inputs):
    load(pipe)
    apply_clear(pipe)
    with pytest.raises(ValueError, match=r"has IP-adapters, but got no image prompt; pass ip_adap"):
        run(pipe.transformer, inputs)


def test_pipeline(pipe):
    options = {
        "ip_adapter_image_embeds": [IMAGE_PROMPT],
        "negative_ip_adapter_image_embeds": [-IMAGE_PROMPT],
        "negative_prompt": "the sea",
        "true_cfg_scale": 2.0,
    }
    load(pipe)
    full = draw(pipe, **options)
    with by_definition(6, 10, 2, far=True, text=6):
        expected = draw(pipe, **options)
    apply_clear(pipe, radius=2)
    np.testing.assert_allclose(draw(pipe, **options), expected, atol=1e-5)
    apply_clear(pipe, radius=FAR)
    np.testing.assert_allclose(draw(pipe, **options), full, atol=1e-5)
