"""Default dtypes and devices change no position and, but for rounding, no image."""

import pytest
import torch
from conftest import make_components, make_inputs, make_transformer
from diffusers import FluxPipeline
from support.families.models import FAMILIES, make_model, run
from support.families.models import make_inputs as make_family_inputs
from support.slow import few

from clear_dit import CLEARFluxPipeline, CLEARProcessor, apply_clear
from clear_dit.attention.grid import layout_from_ids, unrounded_ids


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float64])
def default_dtype(request):
    """A function that sets it; before, models are made as ever."""
    before = torch.get_default_dtype()
    yield lambda: torch.set_default_dtype(request.param)
    torch.set_default_dtype(before)


def test_positions_stay_distinct(default_dtype):
    default_dtype()
    prepare = CLEARFluxPipeline._prepare_latent_image_ids
    ids = prepare(1, 300, 290, torch.device("cpu"), torch.bfloat16)
    assert ids.dtype == torch.float32
    assert len(ids[:, 1].unique()) == 300
    assert len(ids[:, 2].unique()) == 290
    assert torch.equal(ids[290 * 7 + 5], torch.tensor([0, 7, 5], dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_ids_of_stock_pipelines_are_put_right(default_dtype, dtype):
    """As stock makes them in the default dtype, whatever they are cast to."""
    default_dtype()
    stock = FluxPipeline._prepare_latent_image_ids(1, 2, 300, torch.device("cpu"), dtype)
    layout = layout_from_ids(torch.zeros(5, 3), stock)
    assert (layout.rows, layout.columns) == (2, 300)
    exact = unrounded_ids(stock, layout)
    used = stock if exact is None else exact
    assert len(used[:, 2].unique()) == 300
    assert used.dtype == torch.float32


def test_models_get_the_ids_that_were_put_right():
    model, inputs = make_transformer(), make_inputs(2, 300)
    apply_clear(model, radius=2)
    expected = run(model, inputs)
    rounded = inputs | {"img_ids": inputs["img_ids"].bfloat16()}
    assert len(rounded["img_ids"][:, 2].unique()) < 300
    assert torch.equal(run(model, rounded), expected)


def draw(pipe, **options):
    generator = torch.Generator().manual_seed(0)
    size = {"num_inference_steps": 2, "max_sequence_length": 8, "output_type": "pt"} | options
    return pipe("a house", generator=generator, **size).images.float()


@pytest.mark.parametrize("size", [(32, 32), (64, 96)])
def test_cascade(default_dtype, size):
    pipe = CLEARFluxPipeline(**make_components(), native_size=32)
    pipe.set_progress_bar_config(disable=True)
    apply_clear(pipe, radius=2)
    expected = draw(pipe, height=size[0], width=size[1])
    default_dtype()
    found = draw(pipe, height=size[0], width=size[1])
    # bfloat16 and float16 are in what the text encoders and diffusers' own embeddings make.
    assert (found - expected).abs().mean() < 0.02


@pytest.mark.parametrize("name", few(FAMILIES))
def test_families(default_dtype, name):
    model, inputs = make_model(name), make_family_inputs(name, 4, 6)
    stock = make_model(name)
    default_dtype()
    expected = run(stock, inputs)
    apply_clear(model, radius=16, far=False)
    found = run(model, inputs)
    assert (found - expected).norm() < 2e-2 * expected.norm()


@pytest.mark.parametrize("settings", [{"far": True}, {"far": False}, {"down_factor": 2}])
def test_local_attention(default_dtype, settings):
    model, inputs = make_transformer(), make_inputs(8, 8)
    apply_clear(model, radius=2, **settings)
    expected = run(model, inputs)
    model = make_transformer()
    default_dtype()
    apply_clear(model, radius=2, **settings)
    found = run(model, inputs)
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 2e-2 * expected.norm()


def test_what_pooling_begins_with_is_not_rounded(default_dtype):
    default_dtype()
    processor = CLEARProcessor(4, 3)
    assert (processor.spatial_weight.double() - 1 / 9).abs().max() < 1e-8


@pytest.fixture
def default_device():
    """A function that sets it."""
    yield torch.set_default_device
    torch.set_default_device(None)


@pytest.mark.parametrize("settings", [{"far": True}, {"far": False}, {"down_factor": 2}])
# Of the others diffusers' own forward makes tensors on the default device.
@pytest.mark.parametrize(
    "name", few(name for name in FAMILIES if name not in ("chroma", "cogview4"))
)
def test_default_device(default_device, name, settings):
    model, inputs = make_model(name), make_family_inputs(name, 4, 6)
    apply_clear(model, radius=2, **settings)
    expected = run(model, inputs)
    model = make_model(name)
    default_device("meta")
    apply_clear(model, radius=2, **settings)
    assert torch.equal(run(model, inputs), expected)
