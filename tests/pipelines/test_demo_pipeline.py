"""The shipped demo pipeline: CLEAR past the diagonal is full attention, under stock diffusers."""

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from support.slow import slow

from clear_dit import CLEARFluxPipeline, CLEARProcessor, apply_clear, remove_clear
from clear_dit.demo.probe import asked_labels, held_out_captions, load_probe
from clear_dit.generation.models import DEMO, load_pipeline
from clear_dit.pipelines.cascade.resolution import Resolution

PROMPT = "a green tower in the desert at night, a white moon on the right"
SIZES = [(256, 256), (256, 384), (384, 256)]


@pytest.fixture(scope="module")
def pipe():
    pipe = FluxPipeline.from_pretrained(DEMO, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, height, width, prompt=PROMPT, **options):
    """Float pixels (batch, height, width, 3) in [0, 1]."""
    return pipe(
        prompt,
        height=height,
        width=width,
        num_inference_steps=4,
        max_sequence_length=64,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
        **options,
    ).images


@slow
def test_stock_pipeline_past_the_diagonal_is_full_attention(pipe):
    full = [generate(pipe, *size) for size in SIZES]
    stock = pipe.transformer.attn_processors
    pipe.transformer.set_attn_processor(CLEARProcessor(radius=40))
    clear = [generate(pipe, *size) for size in SIZES]
    pipe.transformer.set_attn_processor(CLEARProcessor(radius=3))
    local = [generate(pipe, *size) for size in SIZES]
    pipe.transformer.set_attn_processor(dict(stock))
    again = generate(pipe, *SIZES[0])
    for exact, same, other in zip(full, clear, local, strict=True):
        assert np.abs(exact - same).max() < 1e-4
        assert np.abs(exact - other).max() > 1e-2
    assert np.array_equal(again, full[0])


def test_batch_and_two_passes_of_guidance(pipe):
    prompts = [PROMPT, "a pink balloon by the sea by day, a crimson sun on the left"]
    options = {"negative_prompt": ["", ""], "true_cfg_scale": 2.0}
    full = generate(pipe, 128, 192, prompts, **options)
    apply_clear(pipe, radius=40)
    clear = generate(pipe, 128, 192, prompts, **options)
    remove_clear(pipe)
    assert np.abs(full[0] - full[1]).max() > 0.1
    assert np.abs(full - clear).max() < 1e-4


def test_our_pipeline_takes_the_processor_in_one_line():
    pipe = CLEARFluxPipeline.from_pretrained(DEMO, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    full = generate(pipe, 128, 128)
    pipe.set_attn_processor(CLEARProcessor(radius=40))
    assert np.abs(generate(pipe, 128, 128) - full).max() < 1e-4
    with pytest.raises(ValueError, match="height must be a multiple of 16 pixels, got 120"):
        generate(pipe, 120, 128)


def test_native_size_of_the_demo():
    pipe = load_pipeline("demo", torch.float32, torch.device("cpu"), only_transformer=True)
    assert pipe.native_size == 512


@slow
def test_cascade_is_faithful_to_its_first_image():
    pipe = CLEARFluxPipeline.from_pretrained(DEMO, use_safetensors=True, native_size=256)
    pipe.set_progress_bar_config(disable=True)
    first = generate(pipe, 256, 256)[0]
    apply_clear(pipe, radius=8)
    (large,) = generate(pipe, 512, 512)
    small = large.reshape(256, 2, 256, 2, 3).mean((1, 3))
    assert 10 * np.log10(1 / np.mean((small - first) ** 2)) > 22
    trained = {"cascade": False, "resolution": lambda height, width: Resolution()}
    repeated = generate(pipe, 512, 512, **trained)[0].reshape(256, 2, 256, 2, 3).mean((1, 3))
    assert np.mean((repeated - first) ** 2) > 4 * np.mean((small - first) ** 2)


@slow
@pytest.mark.parametrize("size", [(256, 512), (512, 256)])
def test_other_shapes_than_the_trained_square_show_what_is_asked(size):
    """By the positions of a square they are the upper or the left half of one."""
    pipe = CLEARFluxPipeline.from_pretrained(DEMO, use_safetensors=True, native_size=512)
    pipe.set_progress_bar_config(disable=True)
    probe = load_probe(DEMO / "probe" / "probe.safetensors")
    prompts = held_out_captions(4)
    options = {"negative_prompt": [""] * 4, "true_cfg_scale": 2.0}

    def right(**more):
        images = (255 * generate(pipe, *size, prompts, **options, **more)).astype(np.uint8)
        asked = asked_labels(prompts)
        return (probe.read(images) == asked)[asked >= 0].mean()

    assert right() >= 0.9
    assert right(resolution=lambda height, width: Resolution()) < 0.8
