"""Weights stored in one dtype and computed in another: cast by layer, or cast as a whole.

Expected are stock models that were cast in the same way, past whose diagonal CLEAR sees, and new
models into which the weights came by hand.
"""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import make_components
from diffusers import FluxTransformer2DModel
from diffusers.hooks import apply_layerwise_casting
from safetensors.torch import load_file
from support.autoencoders import make_autoencoder
from support.families.models import FAMILIES, make_inputs, make_model, run
from support.models import FAR, assert_same, draw
from support.slow import few, slow

from clear_dit import (
    CLEARFluxPipeline,
    apply_clear,
    load_clear_weights,
    remove_clear,
    save_clear_weights,
)
from clear_dit.chunking import chunk_feed_forward
from clear_dit.families.table import attention_layers
from clear_dit.pipelines.decoding.autoencoder import decode
from clear_dit.weights.format import parameters_by_key, pooling_by_key
from clear_dit.weights.learned import make_far_trainable

FLOAT8 = torch.float8_e4m3fn
POOLED = [{"down_factor": 2}, {"far": True}]


def cast_by_layer(model):
    model.enable_layerwise_casting(FLOAT8, compute_dtype=torch.float32)


def learn(model):
    """Other values of whatever is learned of pooled keys."""
    if next(iter(attention_layers(model).values())).processor.has_far_keys:
        make_far_trainable(model)
    generator = torch.Generator().manual_seed(3)
    for parameter in pooling_by_key(model).values():
        parameter.data.normal_(0.25, 0.1, generator=generator)


def tuned(name, settings):
    """A model with other attention weights than `make_model(name)`, under CLEAR."""
    model, other = make_model(name), make_model(name, seed=1)
    with torch.no_grad():
        for parameter, value in zip(
            parameters_by_key(model).values(), parameters_by_key(other).values(), strict=True
        ):
            parameter.copy_(value)
    apply_clear(model, radius=2, **settings)
    learn(model)
    return model


@pytest.fixture
def weights(tmp_path):
    """A file of the weights of `tuned`, a function of its arguments."""

    def save(name, settings):
        path = tmp_path / "tuned.safetensors"
        save_clear_weights(tuned(name, settings), path)
        return path

    return save


@pytest.mark.parametrize("first", ["apply", "cast"])
@pytest.mark.parametrize("name", few(FAMILIES))
def test_layerwise_casting(name, first):
    model, stock, given = make_model(name), make_model(name), make_inputs(name, 4, 6)
    exact = run(stock, given)
    cast_by_layer(stock)
    full = run(stock, given)
    assert not torch.allclose(full, exact, atol=1e-3)
    if first == "cast":
        cast_by_layer(model)
    apply_clear(model, radius=FAR, far=False)
    if first == "apply":
        cast_by_layer(model)
    assert_same(run(model, given), full)
    assert remove_clear(model)
    assert torch.equal(run(model, given), full)


@pytest.mark.parametrize("first", ["load", "cast"])
@pytest.mark.parametrize("settings", POOLED, ids=str)
# CogView4's norms have no weights; FLUX.2's layers no to_q.
@slow
@pytest.mark.parametrize("name", ["flux", "flux2", "cogview4"])
def test_layerwise_casting_and_weights(name, settings, first, weights):
    model, stock, expected = make_model(name), make_model(name), tuned(name, settings)
    given = make_inputs(name, 4, 6)
    for each in (stock, expected):
        cast_by_layer(each)
    if first == "cast":
        cast_by_layer(model)
    apply_clear(model, radius=2, **settings, weights=weights(name, settings))
    if first == "load":
        cast_by_layer(model)
    learned = pooling_by_key(model)
    assert learned
    for key, value in pooling_by_key(expected).items():
        assert torch.equal(learned[key], value)  # equal in dtype too
    assert torch.equal(run(model, given), run(expected, given))
    assert remove_clear(model)
    for name, value in stock.state_dict().items():
        assert torch.equal(model.state_dict()[name].float(), value.float()), name


def test_a_model_cast_as_a_whole():
    settings, given = {"down_factor": 2}, make_inputs("flux", 4, 6)
    model, expected = (tuned("flux", settings) for _ in range(2))
    for parameter in expected.parameters():
        if parameter.ndim < 7:  # pooling's have 7
            parameter.data = parameter.data.to(FLOAT8).float()
    apply_layerwise_casting(model, FLOAT8, torch.float32, skip_modules_pattern=None)
    assert_same(run(model, given), run(expected, given))
    assert model.transformer_blocks[0].attn.norm_q.weight.dtype == FLOAT8


@pytest.mark.parametrize("name", ["flux", "cogview4"])
def test_dtypes_of_the_whole_model(name):
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        before, after = make_model(name).to(dtype), make_model(name)
        apply_clear(before, radius=2, down_factor=2)
        apply_clear(after, radius=2, down_factor=2)
        after.to(dtype)
        for model in (before, after):
            assert {p.dtype for p in pooling_by_key(model).values()} == {dtype}


def test_feed_forward_in_chunks():
    model, given = make_model("flux"), make_inputs("flux", 4, 6)
    cast_by_layer(model)
    apply_clear(model, radius=2, far=False)
    whole = run(model, given)
    chunk_feed_forward(model, 5)
    assert_same(run(model, given), whole)


@pytest.fixture
def impatient_threads():
    """Threads take turns as often as can be."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def test_threads_with_a_cast_model(impatient_threads):
    model = make_model("flux")
    cast_by_layer(model)
    apply_clear(model, radius=2, far=False)
    inputs = [make_inputs("flux", rows, 6) for rows in (4, 5, 6, 7)] * 4
    expected = [run(model, given) for given in inputs]
    with ThreadPoolExecutor(4) as pool:
        received = list(pool.map(lambda given: run(model, given), inputs))
    for value, other in zip(received, expected, strict=True):
        assert_same(value, other)


def test_threads_with_a_cast_autoencoder(impatient_threads):
    vae = make_autoencoder((4, 4), latent_channels=4, norm_num_groups=2, sample_size=16)
    cast_by_layer(vae)
    latents = torch.randn(1, 4, 12, 20)
    shifted = latents / vae.config.scaling_factor
    with torch.no_grad():
        expected = vae.decode(shifted).sample
    with ThreadPoolExecutor(4) as pool:
        for image in pool.map(lambda latents: decode(vae, latents), [latents] * 40):
            assert_same(image, expected)


def test_an_error_in_the_middle_of_a_layer(weights):
    model, stock = make_model("flux"), make_model("flux")
    apply_clear(model, radius=2, far=False, weights=weights("flux", {"far": False}))
    layer = model.transformer_blocks[1].attn.to_q
    for each in (model, stock):
        cast_by_layer(each)
    with pytest.raises(RuntimeError):
        layer(torch.zeros(1, 1))
    assert layer.weight.dtype == torch.float32  # as diffusers leaves it
    assert remove_clear(model)
    for name, value in stock.state_dict().items():
        assert torch.equal(model.state_dict()[name].float(), value.float())


@pytest.mark.parametrize("dtype", [FLOAT8, torch.float64], ids=str)
def test_files_have_no_other_dtypes(tmp_path, dtype):
    model, path = make_model("flux"), tmp_path / "clear.safetensors"
    apply_clear(model, radius=2)
    if dtype is FLOAT8:
        cast_by_layer(model)
    else:
        model.double()
    message = rf"save_clear_weights: .*\.attn\.\S+ is {dtype}; .* save before they are cast"
    with pytest.raises(ValueError, match=message):
        save_clear_weights(model, path)
    assert not path.exists()


@pytest.mark.filterwarnings("ignore")
def test_saved_models_with_cast_weights(weights, tmp_path):
    path = weights("flux", {"far": False})
    for first in ("load", "cast"):
        model = make_model("flux")
        if first == "cast":
            cast_by_layer(model)
        apply_clear(model, radius=2, far=False, weights=path)
        if first == "load":
            cast_by_layer(model)
        model.save_pretrained(tmp_path / first)
        saved = FluxTransformer2DModel.from_pretrained(tmp_path / first, torch_dtype=torch.float32)
        with pytest.raises(ValueError, match="saved by save_pretrained with CLEAR weights"):
            remove_clear(saved)
        apply_clear(saved, radius=2, far=False)
        if first == "cast":
            load_clear_weights(saved, path)
        else:
            with pytest.raises(ValueError, match="a cast to 8 bits"):
                load_clear_weights(saved, path)


@pytest.mark.parametrize("first", ["load", "cast"])
def test_a_cascade(weights, first):
    path = weights("flux", {"far": False})
    pipe = CLEARFluxPipeline(**make_components(), native_size=32)
    original = pipe.transformer.transformer_blocks[0].attn.to_q.weight.detach().clone()
    clear = load_file(path)["transformer_blocks.0.attn.to_q.weight"]
    if first == "cast":
        cast_by_layer(pipe.transformer)
    apply_clear(pipe, radius=2, far=False, weights=path)
    if first == "load":
        cast_by_layer(pipe.transformer)
    stages = []

    def look(model, args, kwargs):
        stages.append(model.transformer_blocks[0].attn.to_q.weight.float())

    pipe.transformer.register_forward_pre_hook(look, with_kwargs=True)
    draw(pipe, height=64, width=64)
    for stage, weight in ((0, original), (-1, clear)):
        assert torch.equal(stages[stage], weight.to(FLOAT8).float())
