"""int8 weights of torchao: CLEAR runs on them; CLEAR weights are loaded before, or not at all."""

import logging

import pytest
import torch
from diffusers import FluxTransformer2DModel
from support.models import FAR, assert_differs, assert_same, by_definition, run

from clear_dit import apply_clear, load_clear_weights, remove_clear, save_clear_weights

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torchao")


@pytest.fixture
def quantise():
    """Replaces a model's weights by int8 ones."""
    # torchao takes seconds to import, and says at warning level which GPU libraries it lacks.
    logging.getLogger("torchao").setLevel(logging.ERROR)
    torchao = pytest.importorskip("torchao.quantization")
    return lambda model: torchao.quantize_(model, torchao.Int8WeightOnlyConfig())


@pytest.mark.parametrize("far", [False, True])
def test_attention_of_quantised_models(tiny_transformer, tiny_inputs, quantise, far):
    model, inputs = tiny_transformer(), tiny_inputs(4, 6)
    exact = run(model, inputs)
    quantise(model)
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


def test_weights_are_refused_after_quantisation(tiny_transformer, clear_weights, quantise):
    model = tiny_transformer(guidance_embeds=True)
    quantise(model)
    message = r"0\.attn\.to_q\.weight is quantised or sharded \(Int8Tensor.* on the plain model"
    with pytest.raises(ValueError, match=f"load_clear_weights: .*{message}"):
        apply_clear(model, radius=2, weights=clear_weights)
    apply_clear(model, radius=2)
    with pytest.raises(ValueError, match=f"load_clear_weights: .*{message}"):
        load_clear_weights(model, clear_weights)
    with pytest.raises(ValueError, match=f"save_clear_weights: .*{message}"):
        save_clear_weights(model, clear_weights)


def test_weights_before_quantisation(tiny_transformer, tiny_inputs, clear_weights, quantise):
    model, inputs = tiny_transformer(), tiny_inputs(4, 6)
    apply_clear(model, radius=2, weights=clear_weights)
    plain = run(model, inputs)
    quantise(model)
    received = run(model, inputs)
    torch.testing.assert_close(received, plain, rtol=0.05, atol=0.02)
    with pytest.raises(ValueError, match=r"remove_clear: .* is quantised"):
        remove_clear(model)  # the original weights do not fit any more
    assert torch.equal(run(model, inputs), received)


def test_models_quantised_as_they_are_loaded(tiny_transformer, tiny_inputs, tmp_path, quantise):
    from diffusers import TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    tiny_transformer().save_pretrained(tmp_path)
    model = FluxTransformer2DModel.from_pretrained(
        tmp_path,
        quantization_config=TorchAoConfig(Int8WeightOnlyConfig()),
        torch_dtype=torch.float32,
    )
    inputs = tiny_inputs(4, 6)
    full = run(model, inputs)
    apply_clear(model, radius=FAR)
    assert_same(run(model, inputs), full)
