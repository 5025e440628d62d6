"""Quantised weights: CLEAR runs on them; CLEAR weights are loaded before, or not at all."""

import pytest
import torch
from conftest import make_components
from diffusers import FluxTransformer2DModel
from support.families.models import make_inputs, make_model
from support.families.models import run as run_family
from support.models import FAR, assert_differs, assert_same, by_definition, draw, run
from support.quantised import QUANTISERS, Packed

from clear_dit import (
    CLEARFluxPipeline,
    apply_clear,
    load_clear_weights,
    remove_clear,
    save_clear_weights,
)
from clear_dit.weights.format import pooling_by_key

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torchao"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torchao"),
]
all_kinds = pytest.mark.parametrize("kind", QUANTISERS)


@all_kinds
@pytest.mark.parametrize("far", [False, True])
def test_attention_of_quantised_models(tiny_transformer, tiny_inputs, kind, far):
    model, inputs = tiny_transformer(), tiny_inputs(4, 6)
    exact = run(model, inputs)
    QUANTISERS[kind](model)
    full = run(model, inputs)
    assert not torch.equal(full, exact)
    with by_definition(4, 6, 2, far):
        expected = run(model, inputs)
    assert_differs(expected, full)
    apply_clear(model, radius=FAR, far=far)
    assert_same(run(model, inputs), full)
    apply_clear(model, radius=2, far=far)
    assert_same(run(model, inputs), expected)
    assert remove_clear(model)
    assert torch.equal(run(model, inputs), full)


@torch.no_grad()
def dequantised(name, quantised):
    """A plain model with the weights that a quantised one multiplies by."""
    plain = make_model(name)
    for layer, linear in plain.named_modules():
        if type(linear) is torch.nn.Linear:
            rows = quantised.get_submodule(layer)(torch.eye(linear.in_features))
            linear.weight.copy_((rows if linear.bias is None else rows - linear.bias).T)
    return plain


@all_kinds
@pytest.mark.parametrize("name", ["flux", "cogview4"])
def test_pooled_keys(name, kind):
    model, given = make_model(name), make_inputs(name, 4, 6)
    QUANTISERS[kind](model)
    plain = dequantised(name, model)
    for each in (model, plain):
        apply_clear(each, radius=2, down_factor=2)
    assert {p.dtype for p in pooling_by_key(model).values()} == {torch.float32}
    expected = run_family(plain, given)
    error = (run_family(model, given) - expected).norm()
    apply_clear(plain, radius=2, far=False)
    unlike = (run_family(plain, given) - expected).norm()
    # bitsandbytes' int8 layers also round what they multiply.
    assert error < unlike * (0.5 if kind == "bitsandbytes int8" else 1e-3)


@all_kinds
def test_weights_are_refused_after_quantisation(tiny_transformer, clear_weights, kind):
    model = tiny_transformer(guidance_embeds=True)
    QUANTISERS[kind](model)
    message = r"0\.attn\.to_q.* is quantised or sharded \(\w+, .*on the plain model"
    with pytest.raises(ValueError, match=f"load_clear_weights: .*{message}"):
        apply_clear(model, radius=2, weights=clear_weights)
    apply_clear(model, radius=2)
    with pytest.raises(ValueError, match=f"load_clear_weights: .*{message}"):
        load_clear_weights(model, clear_weights)
    with pytest.raises(ValueError, match=f"save_clear_weights: .*{message}"):
        save_clear_weights(model, clear_weights)


def test_the_kind_is_named(tiny_transformer, tmp_path):
    names = {"torchao int8": "Int8Tensor", "bitsandbytes nf4": "Params4bit", "buffers": "Packed"}
    for kind, name in names.items():
        model = tiny_transformer()
        QUANTISERS[kind](model)
        apply_clear(model, radius=2)
        with pytest.raises(ValueError, match=rf"is quantised or sharded \({name}, "):
            save_clear_weights(model, tmp_path / "clear.safetensors")


@all_kinds
def test_weights_before_quantisation(tiny_transformer, tiny_inputs, clear_weights, kind):
    model, inputs = tiny_transformer(), tiny_inputs(4, 6)
    apply_clear(model, radius=2, weights=clear_weights)
    plain = run(model, inputs)
    QUANTISERS[kind](model)
    received = run(model, inputs)
    coarse = 0.5 if kind == "bitsandbytes nf4" else 0.08
    torch.testing.assert_close(received, plain, rtol=0.05, atol=coarse)
    with pytest.raises(ValueError, match=r"remove_clear: .* is quantised"):
        remove_clear(model)  # the original weights do not fit any more
    assert torch.equal(run(model, inputs), received)


def test_a_cascade_runs_clear_in_all_stages(clear_weights, caplog):
    caplog.set_level("INFO")
    pipe = CLEARFluxPipeline(**make_components(), native_size=32)
    apply_clear(pipe, radius=2, weights=clear_weights)
    QUANTISERS["buffers"](pipe.transformer)
    draw(pipe, height=64, width=64)
    assert "CLEAR runs in every stage of the cascade: CLEARPipeline: " in caplog.text
    assert isinstance(pipe.transformer.transformer_blocks[0].attn.to_q, Packed)


def test_models_quantised_as_they_are_loaded(tiny_transformer, tiny_inputs, tmp_path):
    pytest.importorskip("torchao")
    from diffusers import TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    tiny_transformer().save_pretrained(tmp_path)
    config = TorchAoConfig(Int8WeightOnlyConfig())
    model = FluxTransformer2DModel.from_pretrained(
        tmp_path, quantization_config=config, torch_dtype=torch.float32
    )
    inputs = tiny_inputs(4, 6)
    full = run(model, inputs)
    apply_clear(model, radius=FAR)
    assert_same(run(model, inputs), full)
