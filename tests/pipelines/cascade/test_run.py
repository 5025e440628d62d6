"""CLEARFluxPipeline above the native size: tiny random models, a token is 4 x 4 pixels."""

import json

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from support.slow import slow

from clear_dit import CLEARFluxPipeline, apply_clear, remove_clear
from clear_dit.attention.ip_adapter import LayerProcessor
from clear_dit.pipelines import memory_need
from clear_dit.pipelines.cascade.resolution import Resolution
from clear_dit.pipelines.cascade.run import Request
from clear_dit.pipelines.cascade.stages import Stage
from clear_dit.pipelines.cascade.two_position_processor import full_processor
from clear_dit.weights.format import parameters_by_key


@pytest.fixture
def pipe(tiny_pipeline):
    pipe = CLEARFluxPipeline.from_pipe(tiny_pipeline(FluxPipeline), native_size=16)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, prompt="a red house", seed=0, **options):
    options = {"height": 48, "width": 64, "output_type": "latent", **options}
    return pipe(
        prompt,
        num_inference_steps=options.pop("num_inference_steps", 3),
        max_sequence_length=6,
        generator=options.pop("generator", torch.Generator().manual_seed(seed)),
        **options,
    ).images


def make_image(height=24, width=40, mode="RGB"):
    values = np.random.default_rng(0).integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
    return Image.fromarray(values, mode)


def watch(pipe, **options):
    """The stages a call goes through, one entry for each step, and what it returns."""
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((pipe.stage.name, step, timestep.item(), tuple(tensors["latents"].shape)))
        return tensors

    return seen, generate(pipe, callback_on_step_end=callback, **options)


def test_stages_steps_and_callbacks(pipe):
    seen, latents = watch(pipe, strength=[1.0, 0.6])
    assert [entry[:2] for entry in seen] == [
        *(("20x12", step) for step in range(3)),
        *(("36x24", step) for step in range(3)),
        ("64x48", 0),
    ]
    assert seen[-1][3] == (1, 12 * 16, 4)
    assert latents.shape == (1, 12 * 16, 4)
    # Stages start at their strength, whatever the scheduler's shift.
    assert [entry[2] for entry in seen if entry[1] == 0] == pytest.approx([1000, 1000, 600])
    assert pipe.stage is None


def test_progress_is_named_by_stage_and_put_back(pipe, capsys):
    pipe.set_progress_bar_config(desc="mine", disable=False)
    generate(pipe)
    shown = capsys.readouterr().err
    for description in ("stage 1 of 3, 20x12", "stage 2 of 3, 36x24", "stage 3 of 3, 64x48"):
        assert description in shown
    generate(pipe, height=16, width=16)
    assert "mine" in capsys.readouterr().err


def test_determined_by_the_seed_alone(pipe):
    first = generate(pipe)
    assert torch.equal(generate(pipe), first)
    assert not torch.allclose(generate(pipe, seed=1), first, atol=1e-2)
    seeds = [torch.Generator().manual_seed(seed) for seed in (5, 0)]
    both = generate(pipe, ["a house", "a red house"], generator=seeds)
    torch.testing.assert_close(both[1:], first, atol=1e-5, rtol=1e-5)
    copies = generate(pipe, num_images_per_prompt=2, output_type="np")
    assert copies.shape == (2, 48, 64, 3)
    assert np.abs(copies[0] - copies[1]).max() > 1e-3


def test_output_types(pipe):
    pixels = generate(pipe, output_type="np")
    assert pixels.shape == (1, 48, 64, 3)
    (image,) = generate(pipe, output_type="pil")
    assert image.size == (64, 48)
    assert np.abs(np.asarray(image) / 255 - pixels[0]).max() < 1 / 255
    assert np.array_equal(generate(pipe, output_type="pt").permute(0, 2, 3, 1).numpy(), pixels)
    assert isinstance(
        generate_tuple := pipe(
            "a house",
            height=16,
            width=16,
            return_dict=False,
            max_sequence_length=6,
            num_inference_steps=1,
        ),
        tuple,
    )
    assert generate_tuple[0][0].size == (16, 16)
    with pytest.raises(
        ValueError, match="output_type must be one of pil, np, pt, latent; got 'jpg'"
    ):
        generate(pipe, output_type="jpg")


def test_guidance_of_both_kinds_acts_in_every_stage(pipe, tiny_transformer):
    plain = generate(pipe, strength=0.0)
    guided = {"negative_prompt": "the sea", "true_cfg_scale": 3.0}
    assert not torch.allclose(generate(pipe, strength=0.0, **guided), plain, atol=1e-3)
    image = {"image": make_image(), "height": 48, "width": 80, "preset": "repaint"}
    one, two = generate(pipe, **image), generate(pipe, **image, **guided)
    assert not torch.allclose(one, two, atol=1e-3)
    batch = generate(pipe, ["a red house", "the sea"], **image, **guided)  # one negative prompt
    assert batch.shape[0] == 2
    pipe.register_modules(transformer=tiny_transformer(guidance_embeds=True))
    weak, strong = (generate(pipe, **image, guidance_scale=scale) for scale in (1.0, 9.0))
    assert not torch.allclose(weak, strong, atol=1e-4)


def test_embeddings_in_place_of_prompts(pipe):
    with torch.no_grad():
        embeds, pooled, _ = pipe.encode_prompt("a red house", None, max_sequence_length=6)
    given = generate(pipe, None, prompt_embeds=embeds, pooled_prompt_embeds=pooled)
    assert torch.equal(given, generate(pipe))
    copies = generate(
        pipe, None, prompt_embeds=embeds, pooled_prompt_embeds=pooled, num_images_per_prompt=2
    )
    assert torch.equal(copies, generate(pipe, num_images_per_prompt=2))


def test_strength_zero_is_the_enlarged_image(pipe):
    image = torch.rand(1, 3, 8, 12, generator=torch.Generator().manual_seed(3))
    image = torch.nn.functional.interpolate(image, (24, 36), mode="bicubic").clamp(0, 1)
    kept = generate(pipe, image=image, height=48, width=72, strength=0.0)
    repainted = generate(pipe, image=image, height=48, width=72, strength=1.0)
    other = generate(pipe, image=1 - image, height=48, width=72, strength=1.0)
    assert not torch.allclose(kept, repainted, atol=1e-2)
    assert torch.equal(repainted, other)  # from noise alone
    assert not torch.equal(
        generate(pipe, image=image, strength=0.5, height=48, width=72),
        generate(pipe, image=1 - image, strength=0.5, height=48, width=72),
    )


def test_sizes_with_an_image(pipe):
    assert generate(pipe, image=make_image(24, 40), height=None, width=None).shape[1] == 12 * 20
    assert generate(pipe, image=make_image(25, 41), height=None, width=40).shape[1] == 6 * 10
    assert generate(
        pipe, image=[make_image(), make_image()], prompt=["a", "a"], height=48, width=80
    ).shape == (2, 240, 4)


ARGUMENTS = {
    "alpha": (
        {"image": make_image(mode="RGBA")},
        r"image has an alpha channel \(mode RGBA\); paste",
    ),
    "one pixel": (
        {"image": make_image(1, 1)},
        "image must have at least 16 pixels a side, got 1x1",
    ),
    "tiny": ({"image": make_image(15, 99)}, "at least 16 pixels a side, got 99x15"),
    "4 channels": ({"image": torch.rand(1, 4, 24, 40)}, r"alpha channel \(4 channels\); give 3"),
    "integers": ({"image": torch.ones(3, 24, 40).byte()}, r"must be float, .* torch.uint8"),
    "range": ({"image": 2 * torch.ones(3, 24, 40)}, "values of a tensor must be from 0 to 1"),
    "nan": ({"image": torch.full((3, 24, 40), torch.nan)}, "must be from 0 to 1"),
    "a path": ({"image": "photo.png"}, "must be a PIL image, a list of them or a tensor, got str"),
    "sizes differ": ({"image": [make_image(), make_image(40, 24)]}, "one size, got 40x24, 24x40"),
    "no image": ({"image": []}, "all images must have one size, got none"),
    "three for one": (
        {"image": [make_image()] * 3, "width": 80},
        "3 images to make 1 of; give one, or one for each",
    ),
    "larger": (
        {"image": make_image(96, 128)},
        r"larger \(128x96\) than the image asked for \(64x48",
    ),
    "aspect": (
        {"image": make_image(24, 40), "width": 48},
        "40x24 and the image asked for 48x48, another aspect ratio; ask for 80x48",
    ),
    "size": ({"height": 50}, "height must be a multiple of 4 pixels, got 50"),
    "strength": ({"strength": 1.1}, "strength must be from 0 to 1, got 1.1"),
    "guidance": ({"low_resolution_guidance": 2.0}, "low_resolution_guidance must be from 0 to 1"),
    "steps": (
        {"num_inference_steps": 0},
        "num_inference_steps must be an integer of at least 1, got 0",
    ),
    "latents": ({"latents": torch.zeros(1, 192, 4)}, r"for the first stage, 20x12: \(batch, 15,"),
    "nan latents": ({"latents": torch.full((1, 15, 4), torch.nan)}, "latents must be finite"),
    "latents and image": (
        {"latents": torch.zeros(1, 15, 4), "image": make_image(24, 32)},
        "latents are the noise of an image that has no image=",
    ),
    "generators": (
        {"generator": [torch.Generator()] * 2, "image": make_image(), "width": 80},
        "2 generators for 1 images; give one, or one for each",
    ),
    "no generator": ({"generator": None, "stages_dir": "x"}, "stages_dir needs a generator"),
    "absurd": (
        {"height": 4_000_000, "width": 4_000_000},
        r"4000000x4000000 pixels \(1,000,000,000,000 tokens\) need at least 960,000 GB of memory",
    ),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_refused_before_any_work(pipe, case, monkeypatch):
    options, message = ARGUMENTS[case]
    monkeypatch.setattr(pipe.transformer, "forward", None)
    with pytest.raises(ValueError, match=f"CLEARPipeline.*{message}"):
        generate(pipe, **options)


def test_memory_is_counted_for_the_batch(pipe, monkeypatch):
    need = 192 * 32 * 4 * memory_need.COPIES + 12 * 48 * 64
    monkeypatch.setattr(memory_need, "total_memory", lambda device: need)
    generate(pipe)
    with pytest.raises(ValueError, match="2 images of 64x48 pixels"):
        generate(pipe, num_images_per_prompt=2)


def test_native_size(pipe, tmp_path):
    with pytest.raises(ValueError, match="native_size must be a multiple of 4 pixels, got 18"):
        CLEARFluxPipeline.from_pipe(pipe, native_size=18)
    assert pipe(
        "a house", output_type="np", num_inference_steps=1, max_sequence_length=6
    ).images.shape == (1, 16, 16, 3)
    assert CLEARFluxPipeline(**pipe.components).native_size == 256  # FLUX's 128 latents


def test_cascade_can_be_forced_and_forbidden(pipe):
    assert {entry[0] for entry in watch(pipe, cascade=False)[0]} == {"64x48"}
    size = {"height": 16, "width": 20}
    assert {entry[0] for entry in watch(pipe, **size)[0]} == {"20x16"}
    assert {entry[0] for entry in watch(pipe, **size, cascade=True)[0]} == {"16x16", "20x16"}


def test_not_finite_latents_are_refused_at_once(pipe):
    calls = []

    def poison(module, args, output):
        calls.append(pipe.stage.name)
        return (output[0] * torch.nan,) if len(calls) == 5 else None

    pipe.transformer.register_forward_hook(poison)
    with pytest.raises(
        FloatingPointError,
        match=r"NaN or infinite after step 2 of 3 of stage 2 \(36x24\); use float32 or bfloat16",
    ):
        generate(pipe, strength=1.0)
    assert len(calls) == 5
    assert pipe.stage is None


@pytest.mark.parametrize("stage", ["20x12", "36x24"])
def test_interrupted_image_has_the_size_of_its_stage(pipe, stage, tmp_path):
    steps = []

    def callback(pipe, step, timestep, tensors):
        steps.append(pipe.stage.name)
        pipe._interrupt = pipe.stage.name == stage
        return tensors

    image = generate(pipe, callback_on_step_end=callback, output_type="pil", stages_dir=tmp_path)[0]
    assert f"{image.width}x{image.height}" == stage
    assert steps.count(stage) == 1
    assert {path.name for path in tmp_path.glob("stage*")} == (
        set() if stage == "20x12" else {"stage-1-20x12.safetensors"}
    )
    assert len(generate(pipe, output_type="pil")) == 1  # and the next call is not


@slow
def test_clear_above_the_native_size_only(pipe, tmp_path):
    expected = generate(pipe, strength=0.0)  # an image of the first stage, full attention
    apply_clear(pipe, radius=2)
    weights = {key: torch.randn(p.shape) for key, p in parameters_by_key(pipe.transformer).items()}
    save_file(weights, tmp_path / "clear_local_2.safetensors")
    pipe.load_clear_weights(tmp_path)
    installed = pipe.transformer.attn_processors

    assert torch.equal(generate(pipe, strength=0.0), expected)
    processors = []

    def look(*_):
        kinds = {type(p) for p in pipe.transformer.attn_processors.values()}
        processors.append((pipe.stage.attention, *kinds))

    handle = pipe.transformer.transformer_blocks[0].norm1.register_forward_pre_hook(look)
    local = generate(pipe)
    handle.remove()
    full = full_processor(LayerProcessor)  # the first stage is no square
    assert set(processors) == {("full", full), ("clear", LayerProcessor)}
    assert pipe.transformer.attn_processors == installed
    for key, parameter in parameters_by_key(pipe.transformer).items():
        assert torch.equal(parameter, weights[key])
    remove_clear(pipe)
    assert torch.equal(generate(pipe, strength=0.0), expected)
    assert not torch.allclose(generate(pipe), local, atol=1e-3)


def test_attention_comes_back_after_an_error(pipe, tmp_path):
    apply_clear(pipe, radius=2)
    installed = pipe.transformer.attn_processors

    def stop(pipe, *_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(pipe, callback_on_step_end=stop)
    assert pipe.transformer.attn_processors == installed


def test_fused_projections_keep_clear_weights_in_every_stage(pipe, tmp_path):
    apply_clear(pipe, radius=2)
    weights = {key: torch.randn(p.shape) for key, p in parameters_by_key(pipe.transformer).items()}
    save_file(weights, tmp_path / "clear_local_2.safetensors")
    pipe.load_clear_weights(tmp_path)
    pipe.transformer.fuse_qkv_projections()
    seen = set()

    def callback(pipe, step, timestep, tensors):
        seen.add(pipe.stage.attention)
        return tensors

    generate(pipe, callback_on_step_end=callback)
    assert seen == {"clear"}


class StoppedError(Exception):
    """Raised by a callback in the middle of a stage."""


def stop_in(stage, step=1):
    def callback(pipe, at, timestep, tensors):
        if pipe.stage.name == stage and at == step:
            raise StoppedError
        return tensors

    return callback


@pytest.mark.parametrize("stage", ["20x12", "36x24", "64x48"])
@pytest.mark.parametrize("given", [{}, {"negative_prompt": "sea", "true_cfg_scale": 2.0}])
def test_goes_on_after_the_last_finished_stage(pipe, tmp_path, stage, given):
    given = {"strength": 0.8, **given}
    expected = generate(pipe, **given)
    with pytest.raises(StoppedError):
        generate(pipe, stages_dir=tmp_path, callback_on_step_end=stop_in(stage), **given)
    kept = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    names = ["stage-1-20x12", "stage-2-36x24", "stage-3-64x48"]
    assert (
        kept
        == [f"{name}.safetensors" for name in names if name.split("-")[2] != stage][
            : ["20x12", "36x24", "64x48"].index(stage)
        ]
    )
    seen, latents = watch(pipe, stages_dir=tmp_path, **given)
    assert torch.equal(latents, expected)
    assert seen[0][0] == stage
    seen, latents = watch(pipe, stages_dir=tmp_path, **given)  # nothing left to do
    assert torch.equal(latents, expected)
    assert seen == []


def test_enlarging_a_batch_resumes_too(pipe, tmp_path):
    given = {
        "image": make_image(24, 32),
        "height": 96,
        "width": 128,
        "prompt": ["a house", "the sea"],
        "num_inference_steps": 6,
    }

    def once_more(**options):
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        return generate(pipe, generator=generators, **given, **options)

    expected = once_more()
    with pytest.raises(StoppedError):
        once_more(stages_dir=tmp_path, callback_on_step_end=stop_in("128x96"))
    assert torch.equal(once_more(stages_dir=tmp_path), expected)


OTHERS = {
    "prompt": {"prompt": "the sea"},
    "seed": {"seed": 1},
    "stages": {"height": 64},
    "stages ": {"strength": 0.4},
    "steps, guidance or other setting": {"low_resolution_guidance": 0.5},
    "steps, guidance or other setting ": {"guidance_scale": 1.0},
    "image": {"image": make_image(24, 32)},
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_folder_of_another_request_is_refused(pipe, tmp_path, name):
    generate(pipe, stages_dir=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(
        ValueError, match=rf"stage-1-20x12.safetensors is of another request .*{name.strip()}"
    ):
        generate(pipe, stages_dir=tmp_path, **OTHERS[name])
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_of_another_model_or_attention_is_refused(pipe, tmp_path):
    generate(pipe, stages_dir=tmp_path)
    apply_clear(pipe, radius=2)
    with pytest.raises(ValueError, match=r"of another request .*model"):
        generate(pipe, stages_dir=tmp_path)
    remove_clear(pipe)
    generate(pipe, stages_dir=tmp_path)
    with torch.no_grad():
        pipe.transformer.transformer_blocks[1].attn.to_q.bias[0] += 1e-3
    with pytest.raises(ValueError, match=r"another request \(another model\)"):
        generate(pipe, stages_dir=tmp_path)


def test_stage_files_are_described_and_damaged_ones_refused(pipe, tmp_path):
    generate(pipe, stages_dir=tmp_path)
    path = tmp_path / "stage-2-36x24.safetensors"
    with safe_open(path, framework="pt") as file:
        assert file.get_tensor("latents").shape == (1, 6 * 9, 4)
        assert len(json.loads(file.metadata()["request"])["stages"]) == 3
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"36x24.safetensors is not a finished stage of this prog"):
        generate(pipe, stages_dir=tmp_path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="remove it or name another folder"):
        generate(pipe, stages_dir=tmp_path)


def test_stages_dir_must_be_a_folder(pipe, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"stages_dir: cannot write in the folder"):
        generate(pipe, stages_dir=tmp_path / "file")
    with pytest.raises(ValueError, match=r"cannot tell whether a .* is the same"):
        generate(pipe, stages_dir=tmp_path, joint_attention_kwargs={"mask": object()})


def test_model_offload(pipe):
    image = make_image()
    expected = [generate(pipe), generate(pipe, image=image, height=48, width=80)]
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(generate(pipe), expected[0])
    assert torch.equal(generate(pipe, image=image, height=48, width=80), expected[1])


def test_a_new_pipeline_has_no_progress_bar_yet(pipe):
    del pipe._progress_bar_config
    assert generate(pipe, height=16, width=16).isfinite().all()


def test_a_generator_moves_on(pipe):
    generator = torch.Generator().manual_seed(0)
    for options in ({}, {"image": make_image(), "height": 48, "width": 80}):
        first = generate(pipe, generator=generator, **options)
        assert not torch.allclose(generate(pipe, generator=generator, **options), first, atol=1e-2)


def test_settings_of_stages_can_be_given(pipe):
    seen = []

    def resolution(height, width):
        seen.append((height, width))
        return Resolution(rope="interpolation", rope_factors=(2.0, 2.0), shift=5.0)

    given = generate(pipe, resolution=resolution)
    assert seen == [(12, 20), (24, 36), (48, 64)]
    assert not torch.allclose(given, generate(pipe), atol=1e-2)


def test_low_resolution_guidance_is_for_large_images():
    request = Request((), {}, 1, 3, None, None, None, [], None, None, ())
    weights = [
        request.weight(Stage(side, 64, 0.5, "clear", Resolution())) for side in (4096, 4112, 8192)
    ]
    assert weights == [0.0, 1.0, 1.0]


def test_a_stage_that_refines_takes_one_pass_of_as_many_steps_as_asked(pipe):
    guided = {"negative_prompt": "the sea", "true_cfg_scale": 3.0}
    image = {"image": make_image(), "height": 48, "width": 80, "preset": "refine"}
    assert torch.equal(generate(pipe, **image), generate(pipe, **image, **guided))
    seen, _ = watch(pipe, **image, stage_steps=4)
    assert [entry[:2] for entry in seen] == [("80x48", step) for step in range(4)]


def test_full_attention_in_large_images_is_warned_about(pipe, caplog):
    generate(pipe)
    assert "full attention at 64x48 pixels is slow" in caplog.text
    caplog.clear()
    apply_clear(pipe, radius=2)
    generate(pipe)
    assert "is slow" not in caplog.text


def test_what_an_autoencoder_overflows_to_is_no_image(pipe):
    with torch.no_grad():
        next(pipe.vae.decoder.parameters()).fill_(torch.inf)
    with pytest.raises(FloatingPointError, match="the autoencoder's output is NaN or infinite"):
        generate(pipe, height=16, width=16, output_type="pil")


def test_a_wrong_autoencoder_is_refused_before_any_work(pipe, monkeypatch):
    monkeypatch.setattr(pipe.transformer, "forward", None)
    pipe.vae.encoder = torch.nn.Identity()
    with pytest.raises(ValueError, match="autoencoder: "):
        generate(pipe)


def test_an_extrapolated_shift_is_refused(pipe, monkeypatch):
    monkeypatch.setattr(pipe.transformer, "forward", None)
    pipe.scheduler.register_to_config(use_dynamic_shifting=True, base_shift=9.0)
    with pytest.raises(ValueError, match="dynamic shifting is extrapolated"):
        generate(pipe, height=16, width=16)


def test_bfloat16(pipe):
    expected = generate(pipe)
    pipe.to(torch.bfloat16)
    latents = generate(pipe)
    assert latents.dtype == torch.bfloat16
    assert (latents.float() - expected).abs().mean() < 0.1 * expected.abs().mean()


def test_stage_is_a_value():
    assert Stage(16, 32, None, "full", Resolution()).name == "32x16"
