"""CLEARPipeline of every family: tiny random models, compared with stock diffusers."""

import functools

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Pipeline, FluxPipeline
from support.families.models import FAMILIES
from support.families.pipelines import PIPELINES, call_options, draw, make_pipeline
from support.slow import few

from clear_dit import CLEARFluxPipeline, CLEARPipeline, apply_clear
from clear_dit.pipelines.cascade import run
from clear_dit.pipelines.cascade.enlarge import lanczos
from clear_dit.pipelines.cascade.resolution import Resolution
from clear_dit.pipelines.cascade.schedule import sigmas_for

FAR = 1000
# Whose tiny pipelines have guidance embedded.
ONE_PASS = ("flux", "flux2")

# ERNIE-Image's pipeline gives its scheduler a tensor.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(params=few(FAMILIES, "sd3"))
def name(request):
    return request.param


def side_of(name):
    return PIPELINES[name][2]


def native_size(name):
    """5 tokens, or 6 where sides are multiples of two."""
    return (6 if name == "qwen-image-2.1" else 5) * side_of(name)


def clear(name, radius=FAR, **options):
    pipe = CLEARPipeline(make_pipeline(name), native_size=native_size(name))
    apply_clear(pipe, radius=radius, **options)
    return pipe


def stock_pipeline(name):
    """Without CLEAR; Chroma's has its mask hide padded text, which stock diffusers only adds."""
    pipe = make_pipeline(name)
    if name == "chroma":
        apply_clear(pipe, radius=FAR)
    return pipe


def keep_norms(model):
    for name, module in model.named_modules():
        if name.endswith(("norm_q", "norm_k")):
            module.float()


def as_trained(height, width):
    return Resolution()


def close(images, expected):
    torch.testing.assert_close(images, expected, rtol=0, atol=2e-5)


def test_at_the_native_size_it_is_the_stock_pipeline(name):
    expected = draw(stock_pipeline(name), name, 4, 4)
    pipe = clear(name)
    assert isinstance(pipe, (CLEARPipeline, PIPELINES[name][0]))
    close(draw(pipe, name, 4, 4), expected)
    close(draw(pipe, name, 4, 6, cascade=False, resolution=as_trained),
          draw(stock_pipeline(name), name, 4, 6))  # fmt: skip


@pytest.mark.parametrize("size", [(8, 8), (8, 12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cascade(name, size, dtype):
    pipe, stages = clear(name, radius=3), []
    cast(pipe, dtype)

    def callback(pipe, step, timestep, tensors):
        stages.append(pipe.stage)
        assert tensors["latents"].isfinite().all()
        return {}

    images = draw(pipe, name, *size, callback_on_step_end=callback)
    side = side_of(name)
    channels = 4 if name == "qwen-image-2.1" else 3  # with alpha
    assert images.shape == (2, size[0] * side, size[1] * side, channels)
    assert images.isfinite().all()
    assert images.std() > 1e-3
    planned = list(dict.fromkeys(stages))
    assert len(planned) == 2
    assert (planned[0].attention, planned[1].attention) == ("full", "clear")
    assert planned[1].resolution != Resolution()


def test_an_enlarged_image_is_repainted_by_the_stock_pipeline(name, monkeypatch):
    """With noise, levels and latents made here, by stock parts alone."""
    side, pipe, stock = side_of(name), clear(name), stock_pipeline(name)
    image = torch.rand(1, 3, 4 * side, 6 * side)
    height, width = 8 * side, 12 * side
    pixels = lanczos(image * 2 - 1, height, width)
    latents = encoded(name, stock, pixels.clamp(-1, 1))
    images = 1 if name == "flux3" else 2  # of a call
    noise = torch.randn(images, *latents.shape[1:], generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(run, "randn_tensor", lambda *args: noise)
    steps, strength = 4, 0.6
    got = draw(
        pipe, name, 8, 12, strength=strength, num_inference_steps=steps, resolution=as_trained,
        **{source_of(name): image},
    )  # fmt: skip
    levels = sigmas_for(stock.scheduler, steps, height, width, strength=strength, token_pixels=side)
    assert levels[0] == strength
    start = strength * noise + (1 - strength) * latents
    stock.scheduler = FlowMatchEulerDiscreteScheduler()
    options = {"num_inference_steps": len(levels), "sigmas": levels}
    if name == "ernie-image":  # whose call has no such argument
        of_levels = functools.partial(stock.scheduler.set_timesteps, sigmas=options.pop("sigmas"))
        stock.scheduler.set_timesteps = lambda sigmas, device: of_levels(device=device)
    expected = draw(stock, name, 8, 12, latents=given(name, start), **options)
    close(got, expected)


def cast(pipe, dtype):
    """As `from_pretrained` gives a dtype: some layers of Krea 2 stay in float32."""
    pipe.to(dtype)
    kept = pipe.transformer._keep_in_fp32_modules or ()
    for name, parameter in pipe.transformer.named_parameters():
        if any(part in kept for part in name.split(".")):
            parameter.data = parameter.data.float()


def source_of(name):
    """The argument for an image to enlarge: FLUX.2's `image` is a reference."""
    return "enlarge" if name in ("flux2", "flux3", "qwen-image-2.1") else "image"


def encoded(name, pipe, pixels):
    """Latents as the transformer takes them, (1, channels, height, width), by diffusers alone."""
    vae = pipe.vae
    if name in ("qwen-image", "krea2", "qwen-image-2.1"):
        config = vae.config
        if config.get("in_channels") == 4:
            pixels = torch.cat([pixels, torch.ones_like(pixels[:, :1])], dim=1)  # opaque
        mode = vae.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0]
        mean, std = (
            torch.tensor(x).view(1, -1, 1, 1) for x in (config.latents_mean, config.latents_std)
        )
        return (mode - mean) / std
    mode = vae.encode(pixels).latent_dist.mode()
    if name in ("flux2", "flux3", "ernie-image"):
        patches = Flux2Pipeline._patchify_latents(mode)
        mean = vae.bn.running_mean.view(1, -1, 1, 1)
        std = (vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).sqrt()
        return Flux2Pipeline._unpatchify_latents((patches - mean) / std)
    return (mode - (vae.config.get("shift_factor") or 0)) * vae.config.scaling_factor


def given(name, latents):
    """What `latents=` of a stock pipeline takes, by its own packing."""
    if name in ("flux2", "flux3", "ernie-image"):
        return Flux2Pipeline._patchify_latents(latents)
    if name == "qwen-image-2.1":
        return latents.flatten(2).transpose(1, 2)
    if name in ("flux", "chroma", "qwen-image", "krea2", "longcat-image"):
        return FluxPipeline._pack_latents(latents, *latents.shape)
    return latents


def test_kill_and_resume(name, tmp_path):
    options = {"stages_dir": tmp_path, "output_type": "latent"}
    prompt = "a red house" if name == "flux3" else ["a red house", "the small house by the sea"]

    def latents(pipe, **more):
        return pipe(
            prompt=prompt,
            height=8 * side_of(name),
            width=12 * side_of(name),
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            **call_options(name) | options | more,
        ).images

    def stop(pipe, step, timestep, tensors):
        if pipe.stages.index(pipe.stage) == 1:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        latents(clear(name, radius=3), callback_on_step_end=stop)
    assert [file.name.split("-")[1] for file in tmp_path.glob("stage-*")] == ["1"]
    resumed = latents(clear(name, radius=3))
    assert torch.equal(resumed, latents(clear(name, radius=3), stages_dir=None))


def test_a_models_own_noise_levels_say_how_many_steps():
    name, stages = "qwen-image-2.1", []
    pipe = clear(name, radius=3)
    pipe.register_to_config(sample_sigmas=[1.0, 0.6, 0.3])

    def callback(pipe, step, timestep, tensors):
        stages.append(pipe.stages.index(pipe.stage))
        return {}

    options = {"num_inference_steps": 7, "resolution": as_trained}
    draw(pipe, name, 8, 8, callback_on_step_end=callback, **options)
    # Of three steps evenly spaced from 1, 0.55 is in the second.
    assert stages == [0, 0, 0, 1, 1]


def test_a_pipeline_is_left_as_it_was(name):
    stock = make_pipeline(name)
    expected, before = draw(stock, name, 4, 4), dict(vars(stock))
    pipe = CLEARPipeline(stock, native_size=native_size(name))
    draw(pipe, name, 8, 8, resolution=as_trained)
    assert type(stock) is PIPELINES[name][0]
    assert vars(stock).keys() == before.keys()
    assert stock.scheduler is before["scheduler"]
    assert torch.equal(draw(stock, name, 4, 4), expected)


def test_prompts_are_encoded_once(name, monkeypatch):
    pipe, calls = clear(name, radius=3), []
    forward = type(pipe.text_encoder).forward

    def counted(self, *args, **kwargs):
        calls.append(self)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(pipe.text_encoder), "forward", counted)
    draw(pipe, name, 4, 4)
    of_one_stage = len(calls)
    assert of_one_stage > 0
    draw(pipe, name, 8, 8)
    assert len(calls) == 2 * of_one_stage


def test_the_face_of_flux_1():
    pipe = CLEARPipeline(make_pipeline("flux"), native_size=16)
    assert type(pipe) is CLEARFluxPipeline
    assert CLEARPipeline(pipe).native_size == 16


def test_a_native_size_without_an_autoencoder(tmp_path):
    """HunyuanImage's own has 32 pixels a token, this one 2."""
    CLEARPipeline(make_pipeline("hunyuan-image"), native_size=16).save_pretrained(tmp_path)
    assert CLEARPipeline.from_pretrained(tmp_path, vae=None).native_size == 16


def test_saved_and_loaded(tmp_path):
    pipe = CLEARPipeline(make_pipeline("sd3"), native_size=16)
    pipe.save_pretrained(tmp_path)
    again = CLEARPipeline.from_pretrained(tmp_path)
    assert again.native_size == 16
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(again, "sd3", 8, 8), draw(pipe, "sd3", 8, 8))


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (lambda: torch.nn.Linear(1, 1), "takes a pipeline of diffusers, got Linear"),
        (lambda: make_pipeline("flux").transformer, "takes a pipeline of diffusers, got Flux"),
    ],
)
def test_no_pipeline(thing, message):
    with pytest.raises(ValueError, match=f"CLEARPipeline: {message}"):
        CLEARPipeline(thing())


def test_an_image_by_two_names():
    image = np.zeros((16, 16, 3))
    with pytest.raises(ValueError, match="image and enlarge are the same here"):
        clear("sd3")("a house", image=image, enlarge=image)


def test_a_stage_that_refines_takes_one_pass(name):
    pipe, made = clear(name), []
    side = side_of(name)
    image = {source_of(name): torch.rand(1, 3, 4 * side, 6 * side)}

    def count(module, args, output):
        first = output[0] if isinstance(output, (tuple, list)) else output.sample
        made.append(len(output[0]) if isinstance(first, list) else len(first))

    pipe.transformer.register_forward_hook(count)

    def images_made(preset):
        made.clear()
        draw(pipe, name, 8, 12, preset=preset, stage_steps=2, **image)
        return sum(made)

    passes = 1 if name in ONE_PASS else 2
    assert images_made("refine") == 2 * 2
    assert images_made("repaint") == 2 * 2 * passes
