"""CLEARFluxPipeline and stock pipelines, from prompt to image."""

import numpy as np
import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxPipeline
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from safetensors.torch import save_file
from support.models import by_definition, draw

from clear_dit import CLEARFluxPipeline, CLEARProcessor, apply_clear, remove_clear
from clear_dit.pipelines.cascade.resolution import Resolution
from clear_dit.weights.format import parameters_by_key


def as_trained(pipe, **options):
    """Without the positions that a model trained at squares gets for other shapes."""
    if isinstance(pipe, CLEARFluxPipeline):
        options["resolution"] = lambda height, width: Resolution()
    return draw(pipe, **options)


def assert_same(images, expected):
    np.testing.assert_allclose(images, expected, atol=1e-5)


# Sizes in pixels; a token is 4 x 4.
CALLS = {
    "wide": {},
    "tall": {"height": 40, "width": 16},
    "one row": {"height": 4},
    "batch": {"prompt": ["a house", "the sea"], "num_images_per_prompt": 2},
    "true guidance": {"negative_prompt": "the small sea", "true_cfg_scale": 3.0},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("route", ["bare", "apply_clear", "own pipeline"])
def test_radius_past_the_diagonal_is_the_stock_pipeline(tiny_pipeline, route, call):
    stock = tiny_pipeline(FluxPipeline)
    expected = draw(stock, **CALLS[call])
    if route == "bare":
        pipe = stock
        pipe.transformer.set_attn_processor(CLEARProcessor(radius=99))
    elif route == "apply_clear":
        pipe = stock
        apply_clear(pipe, radius=99)
    else:
        pipe = CLEARFluxPipeline.from_pipe(stock)
        pipe.set_progress_bar_config(disable=True)
        pipe.set_attn_processor(CLEARProcessor(radius=99))
    assert_same(as_trained(pipe, **CALLS[call]), expected)
    assert remove_clear(pipe)
    assert np.array_equal(draw(stock, **CALLS[call]), expected)


@pytest.mark.parametrize("far", [False, True])
def test_small_radius_is_the_pipeline_by_the_definition(tiny_pipeline, far):
    stock, pipe = tiny_pipeline(FluxPipeline), tiny_pipeline(CLEARFluxPipeline)
    pipe.set_attn_processor(CLEARProcessor(radius=2, far=far))
    for height, width in ((24, 40), (40, 24), (24, 40)):  # the resolution changes in one process
        with by_definition(height // 4, width // 4, 2, far, text=6):
            expected = draw(stock, height=height, width=width)
        assert_same(as_trained(pipe, height=height, width=width), expected)


def test_guidance_with_text_of_two_lengths(tiny_pipeline):
    """Embeddings passed in may differ in nothing but length between calls."""
    stock, pipe = tiny_pipeline(FluxPipeline), tiny_pipeline(CLEARFluxPipeline)
    pipe.set_attn_processor(CLEARProcessor(radius=99))
    for length in (5, 7, 5):
        expected = draw(stock, max_sequence_length=length)
        assert_same(as_trained(pipe, max_sequence_length=length), expected)


def test_set_attn_processor_takes_what_diffusers_takes(tiny_pipeline):
    pipe = tiny_pipeline(CLEARFluxPipeline)
    expected = draw(pipe)
    pipe.set_attn_processor(CLEARProcessor(radius=3, proportional_base=66, impl="reference"))
    processors = pipe.transformer.attn_processors
    assert len({id(processor) for processor in processors.values()}) == 4
    assert {repr(p) for p in processors.values()} == {
        "CLEARProcessor(radius=3, down_factor=1, impl='reference', grid=None, "
        "proportional_base=66, references='dense', far=True, pooled_weight='one')"
    }
    chosen = {name: FluxAttnProcessor() for name in processors}
    pipe.set_attn_processor(chosen)
    assert len(chosen) == 4
    assert pipe.transformer.attn_processors == chosen
    assert np.array_equal(draw(pipe), expected)
    pipe.set_attn_processor(FluxAttnProcessor())
    assert np.array_equal(draw(pipe), expected)


def test_explicit_grid(tiny_pipeline):
    pipe = tiny_pipeline(CLEARFluxPipeline)
    expected = as_trained(pipe)
    pipe.set_attn_processor(CLEARProcessor(radius=99, grid=(6, 10)))
    assert_same(as_trained(pipe), expected)
    with pytest.raises(ValueError, match=r"the given grid means 6 x 10 = 60 .* has 40"):
        draw(pipe, height=16)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (
            {"height": 26},
            "height must be a multiple of 4 pixels, got 26; the nearest are 24 and 28",
        ),
        ({"width": 3}, "width must be a multiple of 4 pixels, got 3; the nearest are 4 and 8"),
        ({"width": -4}, "width must be a multiple of 4 pixels, got -4"),
    ],
)
def test_sizes_are_refused_and_not_rounded(tiny_pipeline, size, message):
    with pytest.raises(ValueError, match=f"CLEARPipeline: {message}"):
        draw(tiny_pipeline(CLEARFluxPipeline), **size)


def test_inputs_are_still_checked_by_the_parent(tiny_pipeline):
    with pytest.raises(ValueError, match="Provide either `prompt` or `prompt_embeds`"):
        draw(tiny_pipeline(CLEARFluxPipeline), prompt=None)


def test_position_ids_stay_exact_above_256(tiny_pipeline):
    pipe = tiny_pipeline(CLEARFluxPipeline)
    _, ids = pipe.prepare_latents(1, 1, 4, 4 * 300, torch.bfloat16, "cpu", None)
    assert ids.dtype == torch.float32
    assert ids[:, 2].tolist() == list(range(300))


@pytest.mark.filterwarnings("ignore:.*local_dir_use_symlinks:UserWarning")
def test_saved_and_loaded(tiny_pipeline, tmp_path):
    pipe = tiny_pipeline(CLEARFluxPipeline)
    expected = as_trained(pipe)
    pipe.set_attn_processor(CLEARProcessor(radius=2))
    pipe.save_pretrained(tmp_path)
    for cls in (CLEARFluxPipeline, FluxPipeline):
        loaded = cls.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert_same(as_trained(loaded), expected)


def test_weights_load_through_the_pipeline(tiny_pipeline, tmp_path):
    pipe = tiny_pipeline(CLEARFluxPipeline)
    expected = draw(pipe)
    new = {key: torch.randn(p.shape) for key, p in parameters_by_key(pipe.transformer).items()}
    save_file(new, tmp_path / "clear_local_16.safetensors")
    with pytest.raises(ValueError, match="call apply_clear first"):
        pipe.load_clear_weights(tmp_path)
    pipe.set_attn_processor(CLEARProcessor())
    pipe.load_clear_weights(tmp_path)
    assert not np.allclose(draw(pipe), expected, atol=1e-3)
    remove_clear(pipe)
    assert np.array_equal(draw(pipe), expected)


def test_other_flux_pipelines(tiny_pipeline):
    stock = tiny_pipeline(FluxPipeline)
    pipe = FluxImg2ImgPipeline.from_pipe(stock)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 24, 40, generator=torch.Generator().manual_seed(1))
    expected = draw(pipe, image=image, strength=1.0)
    apply_clear(pipe, radius=99)
    assert_same(draw(pipe, image=image, strength=1.0), expected)


def test_group_offloading(tiny_pipeline):
    pipe = tiny_pipeline(CLEARFluxPipeline)
    expected = draw(pipe)
    pipe.set_attn_processor(CLEARProcessor(radius=99))
    pipe.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    assert_same(draw(pipe), expected)
