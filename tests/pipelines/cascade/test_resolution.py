"""The table of settings, and that they hold within `applied` and nowhere else."""

import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from support.models import draw
from support.slow import slow
from torch import nn

from clear_dit import CLEARFluxPipeline, CLEARProcessor, apply_clear
from clear_dit.attention.positions import ExtendedPosEmbed
from clear_dit.families.sd3 import FAMILY as SD3
from clear_dit.pipelines.cascade.resolution import Resolution, applied, settings_for

LARGE = Resolution(
    rope="yarn", rope_factors=(1.5, 2.5), trained_side=4, shift=2.0, proportional_base=20
)


@pytest.mark.parametrize("size", [(1024, 1024), (1024, 1280), (768, 1344), (512, 512)])
def test_native_sizes_are_generated_as_trained(size):
    assert settings_for(*size) == Resolution()


@pytest.mark.parametrize(
    ("size", "theta"),
    [
        ((2048, 2048), 10),
        ((2048, 4096), 10),
        ((4096, 2048), 10),
        ((8192, 8192), 10),
        ((16384, 16384), 16 ** (56 / 54)),
    ],
)
def test_flux_has_the_published_recipe(size, theta):
    found = settings_for(*size)
    assert found.rope == "ntk"
    assert found.rope_factors == pytest.approx((theta, theta))
    assert (found.shift, found.proportional_base, found.trained_side) == (3.0, 4608, 64)
    assert settings_for(*size, 1024, text_length=256).proportional_base == 4352


@pytest.mark.parametrize(
    ("size", "factors"),
    [
        ((1024, 1024), (2.0, 2.0)),
        ((8192, 8192), (16.0, 16.0)),
        ((768, 1344), (1.984, 2.625)),  # 84 columns, of 32
        ((1344, 768), (2.625, 1.984)),
    ],
)
def test_other_models_get_the_enlargement(size, factors):
    found = settings_for(*size, 512, text_length=64)
    assert found.rope == "yarn"
    assert found.rope_factors == pytest.approx(factors, abs=1e-3)
    assert (found.shift, found.proportional_base, found.trained_side) == (3.0, 1088, 32)
    smaller = settings_for(*(side // 4 for side in size), 128, text_length=64, token_pixels=4)
    assert smaller == found


def test_other_models_get_two_positions_a_token():
    """Rows and columns fill the trained extent but for half a token at both ends."""
    for local in (False, True):  # full attention and pooled keys have it at the native size
        assert settings_for(384, 672, 512, local=local) == Resolution("two", (23 / 30, 41 / 30), 32)
        assert settings_for(256, 384, 512, local=local) == Resolution("two", (15 / 22, 1.0), 32)
        assert settings_for(512, 16, 512, local=local) == Resolution("two", (1.0, 1 / 30), 32)
        for square in (16, 256, 496, 512):
            assert settings_for(square, square, 512, local=local) == Resolution(trained_side=32)
    found = settings_for(1024, 2048, 512, text_length=64, local=True)
    assert found == Resolution("two", (63 / 30, 127 / 30), 32, 3.0, proportional_base=1088)
    assert settings_for(4096, 2048, local=True) == settings_for(4096, 2048)


def test_where_positions_cannot_be_two_the_longer_side_is_interpolated():
    for local in (False, True):
        found = settings_for(384, 672, 512, family=SD3, local=local)
        assert found == Resolution("interpolation", (1.0, 42 / 32), 32)
        assert settings_for(768, 1344, family=SD3, local=local) == Resolution()  # as published


@contextmanager
def used_positions(model):
    """Within it the position embeddings of a model's forwards are collected in a list."""
    used = []
    norm = model.transformer_blocks[0].norm1
    handle = norm.register_forward_pre_hook(lambda *_: used.append(model.pos_embed))
    try:
        yield used
    finally:
        handle.remove()


@pytest.mark.parametrize("clear", [False, True])
def test_two_positions(tiny_pipeline, clear):
    pipe = tiny_pipeline(FluxPipeline)
    if clear:
        apply_clear(pipe, radius=2)
    model, before = pipe.transformer, draw(pipe)
    positions, processors = model.pos_embed, model.attn_processors
    with applied(pipe, Resolution("two", (1.5, 2.5), trained_side=8)):
        assert np.abs(draw(pipe) - before).max() > 1e-5
    with applied(pipe, Resolution("two", (1.0, 1.0), trained_side=8)):  # every position twice
        np.testing.assert_allclose(draw(pipe), before, atol=1e-5)
    assert model.pos_embed is positions
    assert model.attn_processors == processors
    assert np.array_equal(draw(pipe), before)


def test_two_positions_are_not_for_other_processors(tiny_pipeline):
    pipe = tiny_pipeline(FluxPipeline)
    name = "single_transformer_blocks.0.attn"
    layer = pipe.transformer.get_submodule(name)
    layer.set_processor(nn.Identity())
    positions = pipe.transformer.pos_embed
    with pytest.raises(ValueError, match=f'rope "two" is for .*, but {name} has Identity'):
        applied(pipe, Resolution("two", (1.5, 2.5))).__enter__()
    assert pipe.transformer.pos_embed is positions


@pytest.mark.parametrize("cls", [FluxPipeline, CLEARFluxPipeline])
@pytest.mark.parametrize("clear", [False, True])
def test_everything_is_set_and_put_back(tiny_pipeline, cls, clear):
    pipe = tiny_pipeline(cls)
    if clear:
        apply_clear(pipe, radius=2, proportional_base=30)
    prompts = ["a house", "the red sea"]
    before = draw(pipe, prompts)
    model, scheduler, positions = pipe.transformer, pipe.scheduler, pipe.transformer.pos_embed
    config, modules = dict(scheduler.config), [name for name, _ in model.named_modules()]

    with applied(pipe, LARGE):
        assert pipe.scheduler.config.shift == 2.0
        assert model.pos_embed is positions  # but for its own forwards
        with used_positions(model) as used:
            assert not np.allclose(draw(pipe, prompts), before, atol=1e-3)
        if cls is FluxPipeline:  # the other's stages have settings of their own
            extension = used[0].extension
            assert (extension.rope, extension.trained_side) == ("yarn", 4)
            assert extension.rope_factors == (1.5, 2.5)
    with pytest.raises(KeyboardInterrupt), applied(pipe, LARGE):
        raise KeyboardInterrupt

    assert model.pos_embed is positions
    assert pipe.scheduler is scheduler
    assert dict(scheduler.config) == config
    assert [name for name, _ in model.named_modules()] == modules
    if clear:
        assert {p.proportional_base for p in model.attn_processors.values()} == {30}
    assert np.array_equal(draw(pipe, prompts), before)


CHANGES = {
    "rope": {"rope": "ntk", "rope_factors": (10.0, 10.0)},
    "rows": {"rope": "yarn", "rope_factors": (3.0, 1.0), "trained_side": 4},
    "columns": {"rope": "interpolation", "rope_factors": (1.0, 2.0)},
    "shift": {"shift": 4.0},
    "proportional": {"proportional_base": 5},
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_setting_alone_changes_the_image(tiny_pipeline, change):
    pipe = tiny_pipeline(FluxPipeline)
    before = draw(pipe)
    with applied(pipe, Resolution(**CHANGES[change])):
        assert np.abs(draw(pipe) - before).max() > 1e-5
    with applied(pipe, Resolution()):
        assert np.array_equal(draw(pipe), before)


def test_proportional_attention_counts_once(tiny_pipeline):
    pipe = tiny_pipeline(FluxPipeline)
    apply_clear(pipe, radius=3, proportional_base=10)
    expected = draw(pipe)
    with applied(pipe, Resolution(proportional_base=10)):
        np.testing.assert_allclose(draw(pipe), expected, atol=1e-5)
    with applied(pipe, Resolution()):  # which says nothing about it
        assert np.array_equal(draw(pipe), expected)
    apply_clear(pipe, radius=3)
    assert np.abs(draw(pipe) - expected).max() > 1e-5


def test_stages_within_stages(tiny_pipeline):
    pipe = tiny_pipeline(FluxPipeline)
    with applied(pipe, LARGE):
        expected = draw(pipe)
        with applied(pipe, Resolution("ntk", (2.0, 2.0))), used_positions(pipe.transformer) as used:
            draw(pipe)
            assert used[0].extension.rope == "ntk"
            assert pipe.scheduler.config.shift == 2.0
        assert np.array_equal(draw(pipe), expected)


@slow
def test_wrapped_by_torch_compile(tiny_pipeline):
    pipe = tiny_pipeline(FluxPipeline)
    model = pipe.transformer
    pipe.transformer = torch.compile(model, backend="eager")
    with applied(pipe, LARGE), used_positions(model) as used:
        draw(pipe)
    assert isinstance(used[0], ExtendedPosEmbed)
    assert not isinstance(model.pos_embed, ExtendedPosEmbed)


def test_a_pipeline_that_cannot_is_left_as_it_is(tiny_pipeline):
    pipe = tiny_pipeline(CLEARFluxPipeline)
    pipe.set_attn_processor(CLEARProcessor(proportional_base=10))
    scheduler, positions = pipe.scheduler, nn.Identity()
    pipe.transformer.pos_embed = positions
    with pytest.raises(ValueError, match="the transformer's pos_embed is a Identity"):
        applied(pipe, LARGE).__enter__()
    assert pipe.scheduler is scheduler
    assert pipe.transformer.pos_embed is positions
    assert {p.proportional_base for p in pipe.transformer.attn_processors.values()} == {10}
    with applied(pipe, Resolution(shift=2.0)):
        assert pipe.transformer.pos_embed is positions
    with pytest.raises(ValueError, match="applied: supported models are FluxTransformer2DModel"):
        applied(nn.Linear(2, 2), LARGE).__enter__()


def test_dynamic_shifting_becomes_static(tiny_pipeline):
    pipe = tiny_pipeline(FluxPipeline)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    with applied(pipe, Resolution(shift=5.0)):
        assert pipe.scheduler.config.use_dynamic_shifting is False
        assert pipe.scheduler.shift == 5.0
    with applied(pipe, Resolution("ntk", (2.0, 2.0))):
        assert pipe.scheduler.config.use_dynamic_shifting is True


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rope": "dype"}, "rope must be one of none, ntk, yarn, interpolation, two; got 'dype'"),
        ({"rope_factors": (1.0, -2.0)}, r"two positive numbers \(rows, columns\), got \(1.0, -2.0"),
        ({"trained_side": 0}, "trained_side must be an integer of at least 1, got 0"),
        ({"shift": 0.0}, "shift must be a positive number, got 0.0"),
        ({"shift": math.nan}, "shift must be a positive number, got nan"),
        ({"proportional_base": 1}, "proportional_base must be an integer of at least 2, got 1"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Resolution(**settings)
