"""Caches of diffusers that skip blocks: what is computed is local, what is skipped is the same."""

import itertools

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    FluxPipeline,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
)
from support.models import (
    FAR,
    assert_differs,
    assert_same,
    by_definition,
    dense_masks,
    draw,
    image_mask,
    run,
)
from support.slow import slow_but

from clear_dit import CLEARFluxPipeline, CLEARProcessor, apply_clear
from clear_dit.pipelines.cascade.resolution import Resolution


def latents_of(model, args, kwargs):
    """For SeaCache, as one frame: (channels, 1, 1, tokens)."""
    return [kwargs["hidden_states"][0].T[:, None, None]]


# Of a model, which says its timestep now.
CONFIGURATIONS = {
    "first block, all skipped": lambda model: FirstBlockCacheConfig(threshold=10.0),
    "first block, none skipped": lambda model: FirstBlockCacheConfig(threshold=0.0),
    "Taylor": lambda model: TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1),
    "magnitude": lambda model: MagCacheConfig(
        threshold=10.0, retention_ratio=0.25, num_inference_steps=4, mag_ratios=[1.0] * 4
    ),
    "attention broadcast": lambda model: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: model.now
    ),
    "faster": lambda model: FasterCacheConfig(
        is_guidance_distilled=True,
        spatial_attention_timestep_skip_range=(-1, 900),
        current_timestep_callback=lambda: model.now,
    ),
    "sea": lambda model: SeaCacheConfig(threshold=10.0, raw_vision_callback=latents_of),
}


def four_steps(model, inputs, make=None):
    """Predictions at four timesteps, in one kind of pass of the cache."""
    if make is not None:
        model.enable_cache(make(model))
    steps = []
    for step in range(4):
        sigma = 1 - 0.2 * step
        model.now = 1000 * sigma
        with model.cache_context("cond", step_index=step, sigma=sigma, num_inference_steps=4):
            steps.append(run(model, inputs | {"timestep": torch.full((1,), sigma)}))
    if make is not None:
        model.disable_cache()
    return torch.stack(steps)


@pytest.mark.parametrize(
    ("name", "far", "cache_first"),
    slow_but(
        itertools.product(CONFIGURATIONS, (False, True), (True, False)),
        *((name, False, True) for name in ("first block, none skipped", "attention broadcast")),
        ("first block, all skipped", True, False),
    ),
)
def test_caches(tiny_transformer, tiny_inputs, name, far, cache_first):
    make, inputs = CONFIGURATIONS[name], tiny_inputs(4, 6)
    stock, model = tiny_transformer(), tiny_transformer()
    full = four_steps(stock, inputs, make)
    with by_definition(4, 6, 2, far):
        expected, uncached = four_steps(stock, inputs, make), four_steps(stock, inputs)
    assert_differs(expected, full)
    if "none" in name:
        assert_same(expected, uncached)
    else:
        assert_differs(expected, uncached)  # the cache acts
    if cache_first:
        model.enable_cache(make(model))
        apply_clear(model, radius=2, far=far)
        model.disable_cache()
    else:
        apply_clear(model, radius=2, far=far)
    assert_same(four_steps(model, inputs, make), expected)
    apply_clear(model, radius=FAR)
    assert_same(four_steps(model, inputs, make), full)
    assert_same(four_steps(model, inputs), four_steps(stock, inputs))


def test_pipeline_with_true_guidance(tiny_pipeline):
    """Two passes, each with a cache of its own."""

    def guided(pipe, **options):
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
        options |= {"negative_prompt": "the sea", "true_cfg_scale": 2.0}
        images = draw(pipe, num_inference_steps=4, output_type="pt", **options)
        pipe.transformer.disable_cache()
        return images

    with dense_masks(image_mask(6, 10, radius=2, text=6)):
        expected = guided(tiny_pipeline(FluxPipeline))
    pipe, as_trained = tiny_pipeline(CLEARFluxPipeline), lambda height, width: Resolution()
    pipe.set_attn_processor(CLEARProcessor(radius=2, far=False))
    torch.testing.assert_close(guided(pipe, resolution=as_trained), expected, rtol=0, atol=1e-5)
