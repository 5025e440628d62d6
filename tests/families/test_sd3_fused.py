"""Fused projections, before and after CLEAR: SD3, which has processors of their own for them."""

import pytest
import torch
from diffusers.models.attention_processor import FusedJointAttnProcessor2_0, JointAttnProcessor2_0
from peft import LoraConfig
from support.families.models import FAMILIES, make_inputs, make_model, run
from support.families.oracle import FAR, expected
from support.models import assert_differs, assert_same
from support.slow import few

from clear_dit import apply_clear, load_clear_weights, remove_clear, save_clear_weights
from clear_dit.families.table import attention_layers
from clear_dit.weights.format import pooling_by_key

# SD3: neither QK-norm, which the stock fused processor leaves out, nor attn2, in which it fails.
FIRST = {"qk_norm": None, "dual_attention_layers": ()}


@pytest.fixture
def given():
    return make_inputs("sd3", 4, 6)


def kinds(model):
    return {type(processor) for processor in model.attn_processors.values()}


def fused_first(model, **settings):
    model.fuse_qkv_projections()
    apply_clear(model, **settings)


def fused_later(model, **settings):
    apply_clear(model, **settings)
    model.fuse_qkv_projections()


orders = pytest.mark.parametrize("order", [fused_first, fused_later])


@orders
@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("config", [{}, FIRST], ids=["3.5", "3"])
def test_fused_and_unfused_are_the_same(given, order, far, config):
    model, local = make_model("sd3", **config), expected("sd3", 4, 6, 2, far=far, config=config)
    assert_differs(run(make_model("sd3", **config), given), local)
    order(model, radius=2, far=far)
    assert_same(run(model, given), local)
    model.unfuse_qkv_projections()
    assert_same(run(model, given), local)
    model.fuse_qkv_projections()
    model.unfuse_qkv_projections()  # without a forward between
    assert_same(run(model, given), local)
    model.fuse_qkv_projections()
    assert_same(run(model, given), local)


@orders
def test_the_fused_weights_run_as_in_stock(given, order):
    """A LoRA that comes after fusing reaches the outputs alone."""
    targets = ["to_q", "to_k", "to_out.0", "add_q_proj", "add_v_proj"]
    lora = LoraConfig(target_modules=targets, init_lora_weights=False)
    stock, model = make_model("sd3", **FIRST), make_model("sd3", **FIRST)
    stock.fuse_qkv_projections()
    order(model, radius=FAR)
    for one in (stock, model):
        torch.manual_seed(1)
        one.add_adapter(lora)
    assert_same(run(model, given), run(stock, given))
    stock.unfuse_qkv_projections()
    model.unfuse_qkv_projections()
    assert_same(run(model, given), run(stock, given))


@orders
def test_removing_clear_leaves_projections_fused(given, order):
    model = make_model("sd3", **FIRST)
    full = run(model, given)
    order(model, radius=2)
    remove_clear(model)  # before any forward
    assert kinds(model) == {FusedJointAttnProcessor2_0}
    assert_same(run(model, given), full)
    model.unfuse_qkv_projections()
    assert kinds(model) == {JointAttnProcessor2_0}
    assert torch.equal(run(model, given), full)


def test_settings_since_then_outlive_unfusing(given):
    model = make_model("sd3")
    fused_later(model, radius=2, far=False)
    apply_clear(model, radius=3, far=False)
    model.unfuse_qkv_projections()  # diffusers kept the processors of radius 2
    assert_same(run(model, given), expected("sd3", 4, 6, 3))


def test_what_is_learned_outlives_fusing(given):
    model = make_model("sd3")
    apply_clear(model, radius=2, down_factor=2)
    weights = pooling_by_key(model)
    assert len(weights) == 5
    for weight in weights.values():
        weight.data.normal_()
    tuned = run(model, given)
    for change in (model.fuse_qkv_projections, model.unfuse_qkv_projections):
        change()
        assert_same(run(model, given), tuned)
        again = pooling_by_key(model)
        assert all(again[key] is weight for key, weight in weights.items())


def test_weights_after_unfusing(given, tmp_path):
    other, path = make_model("sd3", seed=1), tmp_path / "clear_local_2.safetensors"
    apply_clear(other, radius=2, far=False)
    save_clear_weights(other, path)
    model = make_model("sd3")
    apply_clear(model, radius=2, far=False)
    load_clear_weights(model, path)
    tuned = run(model, given)
    model.fuse_qkv_projections()
    assert_same(run(model, given), tuned)
    for refused in (
        lambda: load_clear_weights(model, path),
        lambda: remove_clear(model),
        lambda: apply_clear(model, radius=2, far=False, weights=path),
    ):
        with pytest.raises(ValueError, match=r"attn has fused projections; call unfuse_qkv_proj"):
            refused()
    assert_same(run(model, given), tuned)
    model.unfuse_qkv_projections()
    load_clear_weights(model, path)  # diffusers leaves its mark of fused projections
    assert_same(run(model, given), tuned)
    remove_clear(model)
    assert torch.equal(run(model, given), run(make_model("sd3"), given))


@pytest.mark.parametrize("name", few(FAMILIES))
def test_fusing_later_changes_no_family(name):
    model, given = make_model(name), make_inputs(name, 4, 6)
    apply_clear(model, radius=2, far=False)
    local = expected(name, 4, 6, 2)
    with torch.no_grad():
        if hasattr(model, "fuse_qkv_projections"):
            model.fuse_qkv_projections()
        else:  # layer by layer, in vain
            for attn in attention_layers(model).values():
                attn.fuse_projections()
    assert_same(run(model, given), local)
    if hasattr(model, "fuse_qkv_projections"):
        model.unfuse_qkv_projections()
        assert_same(run(model, given), local)
