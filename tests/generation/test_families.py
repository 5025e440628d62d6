"""`clear-dit generate` and `render` with a tiny pipeline of every family, given as a folder.

Quick for an autoencoder and a kind of latents each.
"""

import json
from functools import partial

import diffusers
import numpy as np
import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from support.command_line import run
from support.families.folders import NATIVE, size_options, token_pixels
from support.families.pipelines import PIPELINES
from support.slow import few, slow
from torch import nn

import clear_dit.pipelines.cascade.run as cascade_run
from clear_dit.generation.image_output import read_settings
from clear_dit.generation.models import find_model, load_pipeline, quiet_libraries

PROMPT = "a red house"
GUIDANCE = 3.0
# What a stock pipeline is called with for guidance of this strength, in as many passes as it takes.
STOCK = {
    "flux": {"true_cfg_scale": GUIDANCE, "negative_prompt": "", "max_sequence_length": 8},
    "chroma": {"guidance_scale": GUIDANCE, "negative_prompt": ""},
    "flux2": {"guidance_scale": GUIDANCE},
    "sd3": {"guidance_scale": GUIDANCE},
    "qwen-image": {"true_cfg_scale": GUIDANCE, "negative_prompt": " "},
    "z-image": {"guidance_scale": GUIDANCE},
    "hunyuan-image": {},
    "cogview4": {"guidance_scale": GUIDANCE},
    "krea2": {"guidance_scale": GUIDANCE},
    "flux3": {},
    "qwen-image-2.1": {"true_cfg_scale": GUIDANCE, "negative_prompt": " "},
    "longcat-image": {"guidance_scale": GUIDANCE, "negative_prompt": ""},
    "ernie-image": {"guidance_scale": GUIDANCE},
}

families = pytest.mark.parametrize("family", few(PIPELINES, "sd3"))


@pytest.fixture
def folder(family, family_folder):
    """Of the family's tiny pipeline."""
    return family_folder(family)


def generate(folder, out, *options):
    settings = ("--steps", 2, "--radius", 3, "--out", out, "--overwrite")
    return run("generate", PROMPT, "--model", folder, *settings, *options)


def pixels(path):
    with Image.open(path) as image:
        return np.array(image.convert("RGB")).astype(int)


@torch.no_grad()
def stock_image(folder, family, rows, columns, seed, guidance=GUIDANCE, lora=None, **options):
    with quiet_libraries():
        if family == "flux3":
            pipe = stock_modular(folder)
        else:
            pipe = diffusers.DiffusionPipeline.from_pretrained(plain(folder))
    pipe.set_progress_bar_config(disable=True)
    if lora is not None:
        pipe.load_lora_weights(str(lora.parent), weight_name=lora.name)
    if family == "chroma":  # its mask hides nothing but as bools, see clear_dit/families/chroma.py
        pipe.transformer.register_forward_pre_hook(
            lambda model, args, given: (
                args,
                given | {"attention_mask": given["attention_mask"].bool()},
            ),
            with_kwargs=True,
        )
    if family in ("hunyuan-image", "flux3"):
        pipe.guider = pipe.guider.new(guidance_scale=guidance)
    options |= {name: guidance for name in STOCK[family] if name.endswith("_scale")}
    side = token_pixels(family)
    made = pipe(
        prompt=PROMPT,
        height=rows * side,
        width=columns * side,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(seed),
        **STOCK[family] | options,
    ).images
    return np.array(made[0].convert("RGB")).astype(int)


def stock_modular(folder):
    """That of the folder, without the block whose parts it does not have."""
    blocks = diffusers.Flux3ModularPipeline().blocks
    blocks.sub_blocks.pop("prompt_upsampler")
    pipe = blocks.init_pipeline(str(folder))
    pipe.load_components()
    return pipe


def plain(folder):
    """The folder with the stock class's name in it, as others save it."""
    index = folder / "model_index.json"
    text = json.loads(index.read_text())
    name = text["_class_name"].removeprefix("CLEAR")
    found = folder.parent / "plain"
    if not found.exists():
        found.mkdir()
        for part in folder.iterdir():
            (found / part.name).symlink_to(part)
        (found / index.name).unlink()
        (found / index.name).write_text(json.dumps(text | {"_class_name": name}))
    return found


@families
def test_a_window_past_the_diagonal_is_the_stock_pipeline(folder, family, tmp_path, capsys):
    out = tmp_path / "image.png"
    size = size_options(family, NATIVE, NATIVE)
    options = ("--radius", 2 * NATIVE, "--guidance", GUIDANCE, "--seed", 3, *size, "--json")
    assert generate(folder, out, *options) == 0
    told = capsys.readouterr()
    assert json.loads(told.out.splitlines()[-1])["tokens"] == NATIVE**2
    assert read_settings(out)["model"] == str(folder)
    expected = stock_image(folder, family, NATIVE, NATIVE, 3)
    # Some numbers are rounded the other way. Of FLUX.2's 576 tokens 512 are text, all of them seen.
    assert np.abs(pixels(out) - expected).max() <= 1
    assert (pixels(out) != expected).mean() < 0.01
    assert generate(folder, out, *options, "--radius", 1) == 0
    assert (pixels(out) != expected).mean() > 0.05


@families
def test_a_negative_prompt_is_the_stock_pipelines(folder, family, tmp_path, capsys):
    out, negative, strong = tmp_path / "image.png", "the sea", 30.0
    size = size_options(family, NATIVE, NATIVE)
    options = ("--radius", 2 * NATIVE, "--guidance", strong, "--seed", 3, *size)
    status = generate(folder, out, *options, "--negative-prompt", negative)
    if family == "flux2":
        assert status == 2
        assert "no second pass that takes a prompt; leave it out" in capsys.readouterr().err
        return
    assert status == 0
    assert read_settings(out)["negative_prompt"] == negative
    stock = partial(stock_image, folder, family, NATIVE, NATIVE, 3, strong)
    expected = stock(negative_prompt=negative)
    assert np.abs(pixels(out) - expected).max() <= 1
    assert (pixels(out) != expected).mean() < 0.01
    own = stock()
    assert (pixels(out) != own).mean() > 0.05


def save_lora(folder, path):
    """Save a random LoRA on some layers of a folder's transformer, as its pipeline does."""
    pipe = load_pipeline(str(folder), torch.float32, torch.device("cpu"), only_transformer=True)
    layers = [name for name, x in pipe.transformer.named_modules() if isinstance(x, nn.Linear)]
    torch.manual_seed(0)
    config = LoraConfig(r=2, init_lora_weights=False, target_modules=layers[-12:-2])
    pipe.transformer.add_adapter(config)
    state = get_peft_model_state_dict(pipe.transformer)
    pipe.save_lora_weights(path.parent, transformer_lora_layers=state, weight_name=path.name)


@slow
@pytest.mark.parametrize("family", PIPELINES)
def test_with_a_lora_it_is_the_stock_pipeline_with_it(folder, family, tmp_path, capsys):
    out, lora = tmp_path / "image.png", tmp_path / "lora.safetensors"
    size = size_options(family, NATIVE, NATIVE)
    options = ("--radius", 2 * NATIVE, "--guidance", GUIDANCE, "--seed", 3, *size)
    if family in ("hunyuan-image", "longcat-image"):
        lora.touch()
        assert generate(folder, out, *options, "--lora", lora) == 2
        assert "--lora: diffusers loads none for" in capsys.readouterr().err
        return
    save_lora(folder, lora)
    assert generate(folder, out, *options, "--lora", lora) == 0
    expected = stock_image(folder, family, NATIVE, NATIVE, 3, lora=lora)
    assert np.abs(pixels(out) - expected).max() <= 1
    assert (pixels(out) != expected).mean() < 0.01
    without = stock_image(folder, family, NATIVE, NATIVE, 3)
    assert (pixels(out) != without).mean() > 0.05


@families
def test_a_killed_cascade_goes_on_and_an_image_is_enlarged(
    folder, family, tmp_path, monkeypatch, capsys
):
    out, again, stages = tmp_path / "a.png", tmp_path / "b.png", tmp_path / "stages"
    size = size_options(family, 12, 18)
    assert generate(folder, out, *size) == 0
    side = token_pixels(family)
    with Image.open(out) as image:
        assert image.size == (18 * side, 12 * side)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cascade_run, "_repaint", killed)
        assert generate(folder, again, *size, "--stages-dir", stages) == 130
    (kept,) = stages.glob("*.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(cascade_run, "_generate", killed)  # the first stage is not generated anew
        assert generate(folder, again, *size, "--stages-dir", stages) == 0
    assert kept.exists()
    np.testing.assert_array_equal(pixels(out), pixels(again))

    small, large = tmp_path / "small.png", tmp_path / "large.png"
    Image.fromarray(pixels(out).astype(np.uint8)[: 8 * side, : 8 * side]).save(small)
    assert generate(folder, large, "--image", small) == 0
    with Image.open(large) as image:
        assert image.size == (16 * side, 16 * side)


@families
def test_two_jobs_are_rendered_once(folder, family, tmp_path, capsys):
    jobs = tmp_path / "jobs.jsonl"
    lines = [{"prompt": PROMPT, "id": "one"}, {"prompt": "the sea", "id": "two", "radius": 2}]
    jobs.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    command = ("render", jobs, "--out", tmp_path / "out", "--model", folder, "--steps", 1)
    for generated in (2, 0):
        assert run(*command, "--radius", 3, "--json") == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (result["done"], result["generated"]) == (2, generated)
    sidecar = json.loads((tmp_path / "out" / "two.json").read_text())
    assert (sidecar["radius"], sidecar["height"]) == (2, NATIVE * token_pixels(family))
    assert sidecar["guidance"] == find_model(str(folder)).defaults.guidance
