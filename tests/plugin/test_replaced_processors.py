"""Processors in the place of CLEAR's: put right, refused by name, or what somebody asked for."""

import copy
import logging

import pytest
import torch
from diffusers import FluxPipeline
from diffusers.models.attention_processor import JointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from support.families.models import make_inputs, make_model, run
from support.families.oracle import expected
from support.families.pipelines import make_pipeline
from support.ip_adapter import load_ip_adapters, load_sd3_ip_adapter
from support.models import assert_differs, assert_same
from support.models import run as run_flux

from clear_dit import CLEARFluxPipeline, apply_clear, remove_clear
from clear_dit.families.table import attention_layers

STOCK = {"flux": FluxAttnProcessor, "sd3": JointAttnProcessor2_0}
LOADERS = {"flux": load_ip_adapters, "sd3": load_sd3_ip_adapter}
families = pytest.mark.parametrize("name", STOCK)
LOCAL = {"radius": 2, "far": False}


def refused(model, given, number, stock):
    layers = len(attention_layers(model))
    message = rf"^CLEAR: {number} of {layers} attention layers .*\(\S+ has \S+{stock.__name__}\); "
    for _ in range(2):  # not once only
        with pytest.raises(ValueError, match=message + "call remove_clear for full .* again"):
            run(model, given)


@families
def test_stock_processors_are_refused(name):
    model, given, stock = make_model(name), make_inputs(name, 4, 6), STOCK[name]
    full = run(model, given)
    apply_clear(model, **LOCAL)
    layers = attention_layers(model)
    model.set_attn_processor(stock())
    refused(model, given, len(layers), stock)
    apply_clear(model, **LOCAL)
    assert_same(run(model, given), expected(name, 4, 6, 2))
    model.set_attn_processor({key: stock() for key in model.attn_processors})
    refused(model, given, len(layers), stock)
    remove_clear(model)
    assert torch.equal(run(model, given), full)
    apply_clear(model, **LOCAL)
    next(reversed(layers.values())).set_processor(stock())
    refused(model, given, 1, stock)


@families
def test_stock_processors_after_an_adapter_was_unloaded(name):
    pipe, given = make_pipeline(name), make_inputs(name, 4, 6)
    if name == "flux":
        pipe = FluxPipeline(**pipe.components)
    apply_clear(pipe, **LOCAL)
    LOADERS[name](pipe)
    pipe.unload_ip_adapter()
    assert_same(run(pipe.transformer, given), expected(name, 4, 6, 2))
    pipe.transformer.set_attn_processor(STOCK[name]())
    refused(pipe.transformer, given, len(attention_layers(pipe.transformer)), STOCK[name])


@families
def test_loaded_and_unloaded_twice_without_a_forward(name):
    pipe, given = make_pipeline(name), make_inputs(name, 4, 6)
    apply_clear(pipe, **LOCAL)
    for _ in range(2):
        LOADERS[name](pipe)
        pipe.unload_ip_adapter()
    assert_same(run(pipe.transformer, given), expected(name, 4, 6, 2))
    pipe.unload_ip_adapter()  # there is none
    assert_same(run(pipe.transformer, given), expected(name, 4, 6, 2))


def test_stock_processors_after_unfusing():
    model, given = make_model("sd3"), make_inputs("sd3", 4, 6)
    model.fuse_qkv_projections()
    apply_clear(model, **LOCAL)
    run(model, given)
    model.set_attn_processor(JointAttnProcessor2_0())  # unlike unfuse_qkv_projections
    refused(model, given, 5, JointAttnProcessor2_0)


@families
def test_processors_set_again_are_harmless(name):
    model, given = make_model(name), make_inputs(name, 4, 6)
    stock = model.attn_processors
    apply_clear(model, **LOCAL)
    local = run(model, given)
    model.set_attn_processor(model.attn_processors)
    assert torch.equal(run(model, given), local)
    twin = copy.deepcopy(model)
    twin.set_attn_processor(twin.attn_processors)
    assert torch.equal(run(twin, given), local)
    model.set_attn_processor(dict(stock))
    refused(model, given, len(stock), STOCK[name])


@families
def test_processors_of_an_earlier_time(name):
    model, given = make_model(name), make_inputs(name, 4, 6)
    apply_clear(model, **LOCAL)
    earlier = model.attn_processors
    apply_clear(model, radius=3, far=False)
    model.set_attn_processor(dict(earlier))
    assert_same(run(model, given), expected(name, 4, 6, 2))
    assert model.attn_processors == earlier
    larger = make_inputs(name, 6, 8)
    assert_same(run(model, larger), expected(name, 6, 8, 2))
    remove_clear(model)
    assert torch.equal(run(model, given), run(make_model(name), given))


def test_processors_made_again_keep_their_settings():
    """In SD3 too, where each layer may have another kind."""
    model, given = make_model("sd3"), make_inputs("sd3", 4, 6)
    model.fuse_qkv_projections()
    apply_clear(model, **LOCAL)
    model.set_attn_processor({k: type(p)() for k, p in model.attn_processors.items()})
    assert_same(run(model, given), expected("sd3", 4, 6, 2))


def test_full_attention_on_purpose(tiny_pipeline, tiny_inputs, caplog):
    pipe, inputs = tiny_pipeline(CLEARFluxPipeline), tiny_inputs(4, 6)
    model = pipe.transformer
    full = run_flux(model, inputs)
    apply_clear(pipe, **LOCAL)
    local = run_flux(model, inputs)
    with caplog.at_level(logging.WARNING):
        pipe.set_attn_processor(FluxAttnProcessor())
        for _ in range(2):
            assert torch.equal(run_flux(model, inputs), full)
    assert caplog.text.count("4 of 4 attention layers no longer run CLEAR (transformer_blo") == 1
    load_ip_adapters(pipe)
    pipe.unload_ip_adapter()  # what diffusers makes of these layers is full attention still
    assert torch.equal(run_flux(model, inputs), full)
    apply_clear(pipe, **LOCAL)
    assert torch.equal(run_flux(model, inputs), local)
    model.set_attn_processor(FluxAttnProcessor())
    with pytest.raises(ValueError, match=r"4 of 4 attention layers no longer have"):
        run_flux(model, inputs)


def test_some_layers_on_purpose(tiny_pipeline, tiny_inputs):
    pipe, inputs = tiny_pipeline(CLEARFluxPipeline), tiny_inputs(4, 6)
    model = pipe.transformer
    apply_clear(pipe, **LOCAL)
    local, mixed = run_flux(model, inputs), model.attn_processors
    for block in (model.transformer_blocks[1], model.single_transformer_blocks[0]):
        name = next(key for key, one in mixed.items() if one is block.attn.processor)
        mixed[name] = FluxAttnProcessor()
    pipe.set_attn_processor(mixed)
    some = run_flux(model, inputs)
    assert_differs(some, local)
    load_ip_adapters(pipe)
    pipe.unload_ip_adapter()
    assert torch.equal(run_flux(model, inputs), some)
    apply_clear(pipe, **LOCAL)
    assert torch.equal(run_flux(model, inputs), local)
