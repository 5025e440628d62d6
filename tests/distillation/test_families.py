"""Every family on a tiny random pipeline: samples, distillation, its weights, evaluation."""

import itertools
import json

import pytest
import torch
from diffusers import Flux3DistilledModularPipeline
from safetensors import safe_open
from support import command_line
from support.distilling import make_options, make_run
from support.families.folders import save_folder, token_pixels
from support.families.models import FAMILIES
from support.families.pipelines import PIPELINES
from support.slow import few, slow, slow_but

from clear_dit import apply_clear
from clear_dit.distillation.sample import make_request, sample
from clear_dit.distillation.train import distill
from clear_dit.generation.conditioning import conditioning_of, stacked
from clear_dit.generation.denoising import denoise
from clear_dit.generation.index import index_file
from clear_dit.generation.models import load_pipeline
from clear_dit.pipelines.cascade.resolution import Resolution
from clear_dit.weights.format import parameters_by_key

NAMES = tuple(PIPELINES)
# Prompts of different lengths, one of them again.
PROMPTS = "a red house\nthe small house by the sea\na red house\n"
ROWS, COLUMNS = 4, 6


@pytest.fixture(scope="module", params=few(NAMES, "sd3"))
def made(request, tmp_path_factory):
    """A pipeline's folder, three samples of it, the size of their images in pixels."""
    folder = tmp_path_factory.mktemp(request.param)
    side = token_pixels(request.param)
    save_folder(request.param, folder / "model")
    (folder / "prompts.txt").write_text(PROMPTS)
    size = ("--height", ROWS * side, "--width", COLUMNS * side)
    assert (
        command_line.run(
            *("sample", "--model", folder / "model", "--prompts", folder / "prompts.txt"),
            *("--count", 3, "--out", folder / "samples", "--steps", 2, "--images"),
            *("--shard-size", 2, "--device", "cpu", "--dtype", "float32", *size),
        )
        == 0
    )
    return folder, size


def run_distill(folder, out, *arguments):
    return command_line.run(
        *("distill", "--model", folder / "model", "--samples", folder / "samples"),
        *("--out", out, "--radius", 2, "--max-train-steps", 3, "--report-to", "none"),
        *("--train-batch-size", 2, "--gradient-accumulation-steps", 1, "--prompt-dropout", 0.3),
        *("--optimizer", "adamw", "--learning-rate", 1e-2, "--cpu", "--json"),
        *("--mixed-precision", "no", *arguments),
    )


def evaluated(folder, out, weights, size, capsys):
    """Rows of the report: the teacher, untuned, distilled."""
    capsys.readouterr()
    assert (
        command_line.run(
            *("evaluate", "--model", folder / "model", "--prompts", folder / "prompts.txt"),
            *("--weights", weights, "--count", 2, "--steps", 2, "--device", "cpu"),
            *("--metrics", "psnr,output_mse", "--out", out, "--json", *size),
        )
        == 0
    )
    return json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]


def test_sampled_distilled_loaded_and_evaluated(made, tmp_path, capsys):
    folder, size = made
    capsys.readouterr()
    assert run_distill(folder, tmp_path / "run") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["steps"] == 3
    assert min(result["first"].values()) > 0
    path = tmp_path / "run" / "clear_far_2.safetensors"
    assert result["adapter"] == str(path)
    pipe = load_pipeline(str(folder / "model"), torch.float32, torch.device("cpu"))
    before = {name: p.clone() for name, p in parameters_by_key(pipe.transformer).items()}
    apply_clear(pipe, radius=2, weights=path)
    after = parameters_by_key(pipe.transformer)
    assert not any(torch.equal(after[name], before[name]) for name in before)
    with safe_open(path, framework="pt") as file:
        assert all(torch.equal(file.get_tensor(name), after[name]) for name in before)
    teacher, untuned, tuned = evaluated(folder, tmp_path / "out", path, size, capsys)
    assert teacher["impl"] == "full"
    assert 0 < untuned["output_mse"] != tuned["output_mse"] > 0
    assert untuned["psnr"] != tuned["psnr"]


@slow
@pytest.mark.parametrize("made", NAMES, indirect=True)
def test_a_lora(made, tmp_path, capsys):
    folder, size = made
    pipeline = json.loads(index_file(folder / "model").read_text())["_class_name"]
    if pipeline in ("HunyuanImagePipeline", "LongCatImagePipeline"):
        assert run_distill(folder, tmp_path / "run", "--lora", 2) == 2
        assert f"diffusers' {pipeline} neither saves nor" in capsys.readouterr().err
        return
    assert run_distill(folder, tmp_path / "run", "--lora", 2, "--attention-layers", "1") == 0
    path = tmp_path / "run" / "pytorch_lora_weights.safetensors"
    _, untuned, tuned = evaluated(folder, tmp_path / "out", path, size, capsys)
    assert 0 < untuned["output_mse"] != tuned["output_mse"] > 0


def opened(folder, **changes):
    """A `Run` on the samples, ready to step."""
    return make_run(
        make_options(folder / "samples", folder / "run", model=str(folder / "model"), **changes)
    )


def test_the_teacher_is_the_student_where_a_disc_holds_the_image(made):
    folder, _ = made
    run = opened(folder, radius=9, prompt_dropout=0)
    losses = run.losses(run.draws.batch(range(3)))
    assert losses.flow > 0.1
    assert losses.output < 1e-9 * losses.flow
    assert losses.attention < 1e-9


def test_the_teacher_is_the_stock_model_whatever_the_student_learns(made):
    folder, _ = made
    run = opened(folder, radius=1, prompt_dropout=0)
    calls = run.calls(run.draws.batch(range(2)))
    with torch.no_grad():
        before = run._velocity(calls)
        for parameter in run._trained().values():
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        after = run._velocity(calls)
        stock = load_pipeline(str(folder / "model"), torch.float32, torch.device("cpu"), True)
        expected = [stock.transformer(**each, return_dict=False)[0] for each in calls]
    with run.teacher.attention():
        found = run._velocity(calls)
    velocity, shape = run.recipe.denoiser.velocity, run.index.shape
    assert torch.equal(found, torch.cat([velocity(each, shape) for each in expected]))
    assert (before - after).abs().max() > 1e-3
    assert (before - found).abs().max() > 1e-4


def test_the_losses_of_a_batch_are_those_of_its_rows(made):
    """Of prompts of different lengths, too."""
    folder, _ = made
    run = opened(folder, attention_weight=0, prompt_dropout=0)
    trained = list(run._trained().values())
    found = []
    for draws in (range(2), [0], [1]):
        losses = run.losses(run.draws.batch(draws))
        gradients = torch.autograd.grad(losses.total, trained)
        found.append((torch.stack(losses), torch.cat([each.flatten() for each in gradients])))
    assert found[1][0][0] != found[2][0][0]
    for both, one, other in zip(*found, strict=True):
        scale = both.abs().max()
        assert ((one + other) / 2 - both).abs().max() < 1e-5 * scale


@slow
@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_checkpointed_and_with_images(name, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(PROMPTS)
    side = token_pixels(name)
    save_folder(name, tmp_path / "model")
    size = {"height": ROWS * side, "width": COLUMNS * side}
    request = make_request(
        *(str(tmp_path / "model"), str(prompts), 3), steps=2, dtype="bfloat16", device="cpu", **size
    )
    sample(request, tmp_path / "samples", progress=False)
    options = make_options(
        *(tmp_path / "samples", tmp_path / "run"), model=str(tmp_path / "model"),
        mixed_precision="bf16", gradient_checkpointing=True, validation_prompts=str(prompts),
    )  # fmt: skip
    result = distill(options, progress=False)
    assert min(result["last"].values()) > 0
    assert len(list((tmp_path / "run" / "validation").iterdir())) == 3


GUIDED = [(name, FAMILIES[name].guided) for name in NAMES if FAMILIES[name].guided]


@pytest.mark.parametrize(
    ("name", "config"), slow_but([*((name, {}) for name in NAMES), *GUIDED], ("sd3", {}))
)
def test_a_step_of_the_stock_loop_from_what_was_recorded(name, config, tmp_path):
    side = token_pixels(name)
    save_folder(name, tmp_path / "model", **config)
    pipe = load_pipeline(str(tmp_path / "model"), torch.float32, torch.device("cpu"))
    pipe.set_progress_bar_config(disable=True)
    if name == "chroma":  # stock layers do not hide padded text, CLEAR's do
        apply_clear(pipe, radius=9, far=False)
    size = {"height": ROWS * side, "width": COLUMNS * side}
    guidance = pipe.recipe.guidance.of_one_pass(pipe.transformer.config, 3.0)
    seen = []

    def keep(call, step, timestep, tensors):
        seen.append((call.scheduler.sigmas[step + 1], tensors["latents"].clone()))
        return {}

    denoise(
        *(pipe, ["a red house"], [0]), steps=4, guidance=guidance, callback_on_step_end=keep,
        cascade=False, resolution=lambda height, width: Resolution(), **size,
    )  # fmt: skip
    given = conditioning_of(pipe, "a red house", guidance=3.0, **size)
    denoiser = pipe.recipe.denoiser
    for (level, latents), (next_level, expected) in itertools.pairwise(seen):
        arguments = denoiser.arguments(latents, level[None], stacked([given]))
        with torch.no_grad():
            output = pipe.transformer(**arguments, return_dict=False)[0]
            velocity = denoiser.velocity(output, latents.shape[1:])
        found = latents + (next_level - level) * velocity
        moved = (expected - latents).abs().max()
        assert moved > 1e-3
        assert (found - expected).abs().max() < 1e-5 * moved


@pytest.mark.parametrize(
    ("name", "cls", "config", "shape", "target"),
    [
        ("hunyuan-image", None, {"use_meanflow": True}, (4, 4, 6), "timestep_r"),
        ("flux3", Flux3DistilledModularPipeline, {"flow_map": True}, (24, 4), "target_timestep"),
    ],
)
def test_a_mean_flow_model_is_asked_for_the_velocity_at_one_level(
    name, cls, config, shape, target, tmp_path
):
    side = token_pixels(name)
    save_folder(name, tmp_path, cls, **config)
    pipe = load_pipeline(str(tmp_path), torch.float32, torch.device("cpu"))
    given = conditioning_of(pipe, "sea", height=4 * side, width=6 * side, guidance=1.0)
    denoiser = pipe.recipe.denoiser
    arguments = denoiser.arguments(torch.zeros(1, *shape), torch.ones(1) / 4, given)
    assert arguments["timestep"].item() == arguments[target].item() == denoiser.scale / 4
    assert given[target].item() != denoiser.scale / 4
    with torch.no_grad():
        assert pipe.transformer(**arguments, return_dict=False)[0].isfinite().all()
