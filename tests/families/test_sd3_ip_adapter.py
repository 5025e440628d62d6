"""SD3's IP-adapters, loaded and unloaded before and after CLEAR."""

import copy
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from diffusers.models.attention_processor import (
    JointAttnProcessor2_0,
    SD3IPAdapterJointAttnProcessor2_0,
)
from support.families.models import make_inputs, run
from support.families.oracle import FAR, dense_attention, local_mask
from support.families.pipelines import draw, make_pipeline
from support.ip_adapter import load_sd3_ip_adapter as load
from support.models import assert_differs, assert_same
from support.oracle import far_attention_within
from support.slow import slow_but
from torch.nn import functional

from clear_dit import Window, apply_clear, remove_clear
from clear_dit.weights.format import pooling_by_key

ROWS, COLUMNS = 4, 6
PROMPT_TOKENS = 4  # of the adapter's
# (batch, tokens, channels) of an image encoder.
IMAGE_PROMPT = torch.randn(1, 3, 6, generator=torch.Generator().manual_seed(7))
TWO_PROMPTS = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(8))
LOCAL = {"radius": 2, "far": False}


@pytest.fixture
def pipe():
    return make_pipeline("sd3")


@pytest.fixture
def given():
    return make_inputs("sd3", ROWS, COLUMNS)


def prompted(pipe, given, prompt=IMAGE_PROMPT):
    more = {"joint_attention_kwargs": {"ip_adapter_image_embeds": prompt}}
    return run(pipe.transformer, given | more)


@contextmanager
def by_definition(far=False, radius=2, text=5):
    """Inside, stock attention is CLEAR's, and so is that of the IP-adapters over the image."""
    image = ROWS * COLUMNS
    with dense_attention("sd3", ROWS, COLUMNS, radius, text=text, far=far):
        original = functional.scaled_dot_product_attention

        def attend(query, key, value, **options):
            if (query.shape[2], key.shape[2]) != (image, image + PROMPT_TOKENS):
                return original(query, key, value, **options)
            if not far:
                mask = local_mask(image + PROMPT_TOKENS, [(0, ROWS, COLUMNS)], radius)[:image]
                return original(query, key, value, attn_mask=mask)
            query = functional.pad(query, (0, 0, 0, PROMPT_TOKENS))
            window = Window(ROWS, COLUMNS, PROMPT_TOKENS, radius, far_levels=4)
            tensors = (x.transpose(1, 2) for x in (query, key, value))
            return far_attention_within(*tensors, 0, window)[:, :image].transpose(1, 2)

        with mock.patch.object(functional, "scaled_dot_product_attention", attend):
            yield


def loaded_before(pipe, **settings):
    load(pipe)
    apply_clear(pipe, **settings)


def loaded_after(pipe, **settings):
    apply_clear(pipe, **settings)
    load(pipe)


orders = pytest.mark.parametrize("order", [loaded_before, loaded_after])


@orders
@pytest.mark.parametrize("far", slow_but([False, True], True))
def test_loaded_used_and_unloaded(pipe, given, order, far):
    plain = run(pipe.transformer, given)
    with by_definition(far):
        local_plain = run(pipe.transformer, given)
    load(pipe)
    full, full_unprompted = prompted(pipe, given), run(pipe.transformer, given)
    with by_definition(far):
        expected = prompted(pipe, given)
    assert_differs(full, plain)
    assert_differs(expected, full)
    assert_differs(expected, local_plain)
    pipe.unload_ip_adapter()

    order(pipe, radius=2, far=far)
    assert_same(prompted(pipe, given), expected)
    assert_same(run(pipe.transformer, given), local_plain)  # as in stock, without a prompt
    apply_clear(pipe, radius=FAR, far=far)
    assert_same(prompted(pipe, given), full)
    assert_same(run(pipe.transformer, given), full_unprompted)
    apply_clear(pipe, radius=2, far=far)
    pipe.unload_ip_adapter()
    assert_same(run(pipe.transformer, given), local_plain)
    load(pipe)
    assert_same(prompted(pipe, given), expected)


def test_what_the_adapter_adds_is_local_too(pipe, given):
    """At radius 1 an image token sees, by the adapter, itself and the image prompt."""
    load(pipe)
    with by_definition(radius=1):
        expected = prompted(pipe, given)
    apply_clear(pipe, radius=1)
    assert_same(prompted(pipe, given), expected)


@orders
def test_removing_clear_leaves_the_adapter(pipe, given, order):
    load(pipe)
    full = prompted(pipe, given)
    pipe.unload_ip_adapter()
    order(pipe, **LOCAL)
    remove_clear(pipe)  # before any forward
    stock = pipe.transformer.attn_processors
    kinds = {type(p) for name, p in stock.items() if name.startswith("transformer_blocks")}
    assert kinds == {SD3IPAdapterJointAttnProcessor2_0}
    assert torch.equal(prompted(pipe, given), full)
    apply_clear(pipe, **LOCAL)
    prompted(pipe, given)
    remove_clear(pipe)
    assert pipe.transformer.attn_processors == stock


@orders
@pytest.mark.parametrize("forward_between", [False, True])
def test_unloading_and_then_removing_clear(pipe, given, order, forward_between):
    plain = run(pipe.transformer, given)
    order(pipe, **LOCAL)
    if forward_between:
        prompted(pipe, given)
    pipe.unload_ip_adapter()
    with by_definition():
        expected = run(pipe.transformer, given)
    if not forward_between:
        assert_same(run(pipe.transformer, given), expected)
    remove_clear(pipe)
    kinds = {type(processor) for processor in pipe.transformer.attn_processors.values()}
    assert kinds == {JointAttnProcessor2_0}
    assert torch.equal(run(pipe.transformer, given), plain)


@orders
def test_scale(pipe, given, order):
    with by_definition():
        unprompted = run(pipe.transformer, given)
    order(pipe, **LOCAL)
    prompted(pipe, given)
    assert pipe.is_ip_adapter_active
    pipe.set_ip_adapter_scale(0.0)
    assert not pipe.is_ip_adapter_active
    assert_same(prompted(pipe, given), unprompted)
    pipe.set_ip_adapter_scale(0.8)
    scaled = prompted(pipe, given)
    remove_clear(pipe)
    with by_definition():
        assert_same(scaled, prompted(pipe, given))


def test_another_adapter_and_a_batch_of_prompts(pipe):
    given = make_inputs("sd3", ROWS, COLUMNS, batch=2)
    apply_clear(pipe, **LOCAL)
    load(pipe)
    prompted(pipe, given, TWO_PROMPTS)
    pipe.unload_ip_adapter()
    load(pipe, seed=1)
    found = prompted(pipe, given, TWO_PROMPTS)
    remove_clear(pipe)
    with by_definition():
        assert_same(found, prompted(pipe, given, TWO_PROMPTS))


@pytest.mark.parametrize("down_factor", [1, 2], ids=["local", "pooled"])
def test_what_is_learned_survives(pipe, given, down_factor):
    apply_clear(pipe, radius=2, down_factor=down_factor, far=False)
    weights = pooling_by_key(pipe.transformer)
    assert len(weights) == (5 if down_factor == 2 else 0)
    for weight in weights.values():
        weight.data.normal_()
    plain = run(pipe.transformer, given)
    load(pipe)
    assert_differs(prompted(pipe, given), plain)
    pipe.unload_ip_adapter()
    assert torch.equal(run(pipe.transformer, given), plain)
    again = pooling_by_key(pipe.transformer)
    assert again.keys() == weights.keys()
    assert all(again[key] is weight for key, weight in weights.items())


def test_fused_first(pipe, given):
    """An IP-adapter's processors do not run fused projections, nor what is left by unloading."""
    load(pipe)
    with by_definition():
        expected = prompted(pipe, given)
        pipe.unload_ip_adapter()
        unprompted = run(pipe.transformer, given)
    pipe.transformer.fuse_qkv_projections()
    apply_clear(pipe, **LOCAL)
    for block in pipe.transformer.transformer_blocks:
        block.attn.to_qkv.weight.data.zero_()
    assert_differs(run(pipe.transformer, given), unprompted)
    load(pipe)
    assert_same(prompted(pipe, given), expected)
    pipe.unload_ip_adapter()
    assert_same(run(pipe.transformer, given), unprompted)


def test_copies(pipe, given):
    load(pipe)
    apply_clear(pipe, **LOCAL)
    expected = prompted(pipe, given)
    twin = copy.copy(pipe)
    twin.transformer = copy.deepcopy(pipe.transformer)
    pipe.set_ip_adapter_scale(0.0)
    assert torch.equal(prompted(twin, given), expected)
    remove_clear(twin)
    assert not torch.equal(prompted(twin, given), prompted(pipe, given))


@orders
def test_pipeline(pipe, order):
    """One prompt for each of guidance's passes."""
    options = {"ip_adapter_image_embeds": TWO_PROMPTS, "rows": ROWS, "columns": COLUMNS}
    load(pipe)
    full = draw(pipe, "sd3", **options)
    text = []
    pipe.transformer.context_embedder.register_forward_hook(
        lambda module, given, out: text.append(out.shape[1])
    )
    draw(pipe, "sd3", **options)
    with by_definition(text=text[0]):
        expected = draw(pipe, "sd3", **options)
    pipe.unload_ip_adapter()
    assert_differs(expected, full)
    order(pipe, **LOCAL)
    torch.testing.assert_close(draw(pipe, "sd3", **options), expected, rtol=0, atol=1e-4)
    apply_clear(pipe, radius=FAR)
    torch.testing.assert_close(draw(pipe, "sd3", **options), full, rtol=0, atol=1e-4)
