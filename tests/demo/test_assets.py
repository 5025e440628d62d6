from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from support.slow import slow

from clear_dit.demo.evaluate import generate, score
from clear_dit.demo.probe import held_out_captions, load_probe, probe_accuracy
from clear_dit.generation.models import find_model, load_pipeline

ASSETS = Path(__file__).parents[2] / "assets"
DEMO, SECOND = ASSETS / "demo", ASSETS / "demo-sd3"
TEXT = "a blue house in the hills at night, a golden moon on the left"


@pytest.fixture(scope="module")
def pipe():
    pipeline = FluxPipeline.from_pretrained(DEMO)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("folder", [DEMO, SECOND], ids=lambda folder: folder.name)
def test_folder_is_small_and_safe(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40 * 2**20
    assert max(path.stat().st_size for path in files) <= 16 * 2**20
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o644"}
    assert {p.suffix for p in files} <= {".safetensors", ".json", ".md", ".png"}


def test_the_second_adds_little_to_the_first():
    known = {path.read_bytes() for path in DEMO.rglob("*") if path.is_file()}
    files = [path.read_bytes() for path in SECOND.rglob("*") if path.is_file()]
    assert sum(len(one) for one in files if one not in known) <= 10 * 2**20
    assert sum(one in known for one in files) >= 3  # autoencoder, T5, probe


@pytest.mark.parametrize("folder", [DEMO, SECOND], ids=lambda folder: folder.name)
def test_card_says_how_it_was_trained(folder):
    card = (folder / "README.md").read_text()
    for part in ("python -m clear_dit.demo.train", "Hardware:", "hours", "loss.png", "steps of"):
        assert part in card


def test_geometry(pipe):
    assert pipe.vae_scale_factor == 8
    assert pipe.transformer.config.attention_head_dim == 64
    assert pipe.transformer.config.num_layers >= 2
    assert pipe.transformer.config.num_single_layers >= 4
    assert pipe.tokenizer.model_max_length <= 64
    assert pipe.tokenizer_2.model_max_length <= 64


def test_padding_to_512_does_not_change_the_image(pipe):
    images = [
        pipe(
            TEXT,
            height=256,
            width=256,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            max_sequence_length=length,
            output_type="np",
        ).images[0]
        for length in (64, 512)
    ]
    other = pipe(
        TEXT.replace("night", "dusk"),
        height=256,
        width=256,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        max_sequence_length=64,
        output_type="np",
    ).images[0]
    padded = np.abs(images[0] - images[1]).mean()
    assert padded < 0.01
    assert padded < 0.3 * np.abs(images[0] - other).mean()


def test_text_encoders_hide_padding(pipe):
    with torch.no_grad():
        short = pipe.encode_prompt(TEXT, max_sequence_length=32)[0]
        long = pipe.encode_prompt(TEXT, max_sequence_length=512)[0]
    assert (short - long[:, :32]).abs().max() < 5e-3
    assert (long[:, 32:] - short[:, -1:]).abs().max() < 1e-3


def test_autoencoder_is_faithful(pipe):
    from clear_dit.demo.autoencoder import psnr, to_tensor
    from clear_dit.demo.captions import Scene
    from clear_dit.demo.world import render

    scene = Scene("sunset", "desert", "moon", "white", "right", "balloon", "violet", seed=3)
    image = to_tensor(render(scene, 512, 512)[None])
    with torch.no_grad():
        output = pipe.vae.decode(pipe.vae.encode(image).latents).sample
    assert psnr(output, image) > 30
    assert (output - image).mean((2, 3)).abs().max() < 0.03


def test_probe_reads_rendered_images():
    probe = load_probe(DEMO / "probe" / "probe.safetensors")
    assert probe_accuracy(probe, count=64, size=128).mean() >= 0.99


def test_the_second_demo_by_name():
    model = find_model("demo-sd3")
    assert model.family.title == "Stable Diffusion 3, 3.5"
    assert (model.native_size, model.token_pixels) == (512, 16)
    assert model.defaults.guidance == 2


@slow
def test_the_second_demo_shows_what_it_is_asked_for():
    """Of the card's 64 captions, four."""
    pipe = load_pipeline("demo-sd3", torch.float32, torch.device("cpu"))
    captions = held_out_captions(4)
    images = generate(pipe, captions, size=512, steps=20, true_cfg_scale=2.0, seed=0, batch=4)
    found = score(load_probe(SECOND / "probe" / "probe.safetensors"), images, captions)
    assert found["hits"].mean() >= 0.9
