"""Step caches in CLEARPipeline: each stage's alone, right for its steps, or refused.

Tiny random FLUX, a token is 4 x 4 pixels: stages of 20 x 12 and 36 x 24 pixels.
"""

import math
import threading

import pytest
import torch
from diffusers import (
    ChromaPipeline,
    CogView4Pipeline,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    FluxPipeline,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
    TextKVCacheConfig,
)
from support.families.pipelines import make_pipeline
from support.slow import slow, slow_but

from clear_dit import CLEARFluxPipeline, CLEARPipeline, apply_clear
from clear_dit.pipelines.cascade.step_caches import _for_steps

NEVER = {"current_timestep_callback": lambda: None}  # the pipeline knows the timestep itself
BROADCAST = {"spatial_attention_block_skip_range": 2, **NEVER}
ALL = {"spatial_attention_timestep_skip_range": (-1, 900)}
# And the number of attention layers computed in the last stage, of 4 in each of 4 steps.
CACHES = {
    "first block": (FirstBlockCacheConfig(threshold=10.0), 7),
    "magnitude": (MagCacheConfig(threshold=10.0, mag_ratios=[1.0] * 28, retention_ratio=0.25), 4),
    "Taylor": (TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1), 8),
    "attention broadcast": (PyramidAttentionBroadcastConfig(**BROADCAST), 8),
    # Its range takes in all steps of the last stage, the first too.
    "faster": (FasterCacheConfig(is_guidance_distilled=True, **ALL, **NEVER), 8),
}


@pytest.fixture
def pipe(tiny_pipeline):
    pipe = CLEARFluxPipeline.from_pipe(tiny_pipeline(FluxPipeline), native_size=16)
    pipe.set_progress_bar_config(disable=True)
    apply_clear(pipe, radius=2, far=False)
    return pipe


def generate(pipe, height=24, width=36, **options):
    return pipe(
        "a red house",
        height=height,
        width=width,
        num_inference_steps=6,
        strength=0.85,
        max_sequence_length=6,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        **options,
    ).images


def layers_computed(pipe, **options):
    """Latents, and how many attention layers each stage ran."""
    found = dict[str, int]()

    def count(*_):
        name = pipe.stage.name
        found[name] = found.get(name, 0) + 1

    # Below the caches' hooks.
    transformer = pipe.transformer
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    hooks = [block.attn.to_q.register_forward_hook(count) for block in blocks]
    latents = generate(pipe, **options)
    for hook in hooks:
        hook.remove()
    return latents, found


@pytest.mark.parametrize("name", slow_but(CACHES, "faster"))
def test_each_stage_begins_anew(name, pipe):
    config, computed = CACHES[name]
    plain, everything = layers_computed(pipe)
    assert everything == {"20x12": 24, "36x24": 16}
    pipe.transformer.enable_cache(config)
    cached, found = layers_computed(pipe)
    assert found["36x24"] == computed
    assert not torch.allclose(cached, plain, atol=1e-3)

    def fail(*_):
        raise KeyError("enough")

    with pytest.raises(KeyError):  # in a stage of the same size as the next call's first
        generate(pipe, height=12, width=20, callback_on_step_end=fail)
    assert torch.equal(generate(pipe), cached)
    pipe.transformer.disable_cache()
    assert torch.equal(generate(pipe), plain)


@slow
def test_threads_take_turns(pipe):
    pipe.transformer.enable_cache(PyramidAttentionBroadcastConfig(**BROADCAST))
    sizes = [(24, 36), (12, 20)]
    expected = [generate(pipe, *size) for size in sizes]
    found = dict[tuple[int, int], torch.Tensor]()
    threads = [
        threading.Thread(target=lambda size=size: found.update({size: generate(pipe, *size)}))
        for size in sizes
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[size], one) for size, one in zip(sizes, expected, strict=True))


def test_ratios_of_magnitudes_suit_a_stage():
    ratios = [1.0, 1.2, 1.1, 1.05, 1.0, 0.9, 0.8, 0.5]
    config = MagCacheConfig(mag_ratios=ratios, num_inference_steps=8)

    def fitted(begins, steps):
        found = _for_steps(config, begins, steps)
        assert found.num_inference_steps == len(found.mag_ratios) == steps
        return found.mag_ratios.tolist()

    assert fitted(0, 8) == pytest.approx(ratios)
    # The second half of the schedule, step by step and in steps of two.
    assert fitted(0.5, 4) == pytest.approx([1, *ratios[5:]])
    assert fitted(0.5, 2) == pytest.approx([1, ratios[5] * ratios[6]])
    # All of it, in half and in twice the steps.
    assert fitted(0, 4) == pytest.approx([1, 1.2 * 1.1, 1.05 * 1.0, 0.9 * 0.8])
    assert fitted(0, 16)[:4] == pytest.approx([1, math.sqrt(1.2), math.sqrt(1.2), math.sqrt(1.1)])
    calibrating = _for_steps(MagCacheConfig(calibrate=True), 0.5, 4)
    assert calibrating.num_inference_steps == 4
    assert calibrating.calibrate


def test_a_cache_that_finds_no_layer_is_refused():
    pipe = CLEARPipeline(make_pipeline("cogview4", CogView4Pipeline))
    pipe.transformer.enable_cache(TaylorSeerCacheConfig())
    with pytest.raises(ValueError, match="TaylorSeerCacheConfig has found no layer in CogView4Tr"):
        pipe("a house", height=16, width=16, num_inference_steps=1)


REFUSED = {
    "sea": (SeaCacheConfig(), {}, "SeaCache skips nothing here, as FluxPipeline does not tell it"),
    "text": (TextKVCacheConfig(), {}, "TextKVCache keeps nothing here, .* Nucleus-Image alone"),
    "faster": (FasterCacheConfig(**NEVER), {}, r"FasterCache .*\(is_guidance_distilled=True\)"),
    "two passes": (
        PyramidAttentionBroadcastConfig(**BROADCAST),
        {"negative_prompt": "the sea", "true_cfg_scale": 2.0},
        "PyramidAttentionBroadcast keeps one output of a layer, which the 2 passes .* or no neg",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("cache_first", slow_but([True, False], False))
def test_what_would_do_nothing_or_harm_is_refused(name, cache_first, tiny_pipeline):
    config, options, message = REFUSED[name]
    pipe = CLEARPipeline(tiny_pipeline(FluxPipeline), native_size=16)
    if cache_first:
        pipe.transformer.enable_cache(config)
    apply_clear(pipe, radius=2)
    if not cache_first:
        pipe.transformer.enable_cache(config)
    pipe.transformer.register_forward_hook(lambda *_: pytest.fail("work has begun"))
    with pytest.raises(ValueError, match=f"^CLEARPipeline: {message}"):
        generate(pipe, **options)


@slow
def test_a_pipeline_that_does_not_tell_its_passes_is_refused():
    pipe = CLEARPipeline(make_pipeline("chroma", ChromaPipeline))
    pipe.transformer.enable_cache(TaylorSeerCacheConfig())
    with pytest.raises(ValueError, match=r"TaylorSeer must be told which pass .* ChromaPipeline"):
        pipe("a house", height=16, width=16, num_inference_steps=1, max_sequence_length=6)
