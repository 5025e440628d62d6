from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from diffusers import DiffusionPipeline, FluxTransformer2DModel, StableDiffusion3Pipeline
from support.slow import slow
from transformers import CLIPTextModel, T5EncoderModel

from clear_dit.demo import sd3, train_sd3
from clear_dit.demo.evaluate import generate
from clear_dit.demo.muon import Float32Muon, orthogonalise
from clear_dit.demo.train import main
from clear_dit.demo.transformer import Batch, Phase, pack

FIRST = Path(__file__).parents[2] / "assets" / "demo"
TEXTS = ["a blue house in the hills at night, a golden moon on the left", ""]
TINY = train_sd3.Plan(
    size=512,
    count=2,
    taught=2,
    phases=(
        Phase("phase-1", 16, 1, 2, 0.01, 2e-3, 0.3, 0.3),
        Phase("phase-2", 32, 1, 2, 0.01, 2e-3, 1.0, 0.3),
        Phase("phase-3", 32, 1, 1, 0.01, 2e-3, 1.0, 0.3),
    ),
    save_every=1,
)


@pytest.fixture(scope="module")
def encoders():
    return sd3.TextEncoders(FIRST)


@pytest.fixture(scope="module")
def teacher():
    return FluxTransformer2DModel.from_pretrained(FIRST / "transformer").requires_grad_(False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd3")
    train_sd3.run(
        folder / "work", folder / "demo", train_sd3.STAGES, threads=1, first=FIRST, plan=TINY
    )
    return folder


def test_encoders_say_what_the_first_demo_s_say(encoders):
    pooled, words, real = encoders(TEXTS, 40)
    ids = encoders.tokenizer(TEXTS, padding=True, return_tensors="pt").input_ids
    first = CLIPTextModel.from_pretrained(FIRST / "text_encoder")(ids).pooler_output
    torch.testing.assert_close(pooled[:, :128], first, rtol=0, atol=1e-4)
    ids = encoders.tokenizer_3(
        TEXTS, padding="max_length", max_length=40, return_tensors="pt"
    ).input_ids
    tokens = T5EncoderModel.from_pretrained(FIRST / "text_encoder_2")(ids)[0]
    torch.testing.assert_close(words[:, sd3.CLIP_LENGTH :], tokens, rtol=0, atol=1e-4)
    assert real.sum(1).tolist() == [sd3.CLIP_LENGTH + 16, sd3.CLIP_LENGTH + 1]


@slow
def test_encoders_do_as_the_stock_pipeline_does(encoders, trained):
    pipe = StableDiffusion3Pipeline.from_pretrained(trained / "demo")
    words, _, pooled, _ = pipe.encode_prompt(
        TEXTS, None, None, do_classifier_free_guidance=False, max_sequence_length=40
    )
    expected = encoders(TEXTS, 40)
    torch.testing.assert_close(words, expected[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(pooled, expected[0], rtol=0, atol=1e-5)


@slow
def test_stages_make_a_stock_pipeline(trained):
    pipe = DiffusionPipeline.from_pretrained(trained / "demo")
    assert isinstance(pipe, StableDiffusion3Pipeline)
    images = generate(pipe, TEXTS, size=64, steps=1, true_cfg_scale=2.0, seed=0, batch=2)
    assert images.shape == (2, 64, 64, 3)
    assert (
        f"1 steps of 2 images, {TINY.kept} of 32x32 tokens"
        in (trained / "demo" / "README.md").read_text()
    )


def test_patches_and_output_are_the_first_demo_s(teacher):
    model = sd3.build_transformer()
    sd3.start_from_flux(model, teacher, single=3)
    latents = torch.randn(1, 16, 8, 8)
    tokens = model.pos_embed.proj(latents).flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens, teacher.x_embedder(pack(latents)), rtol=0, atol=1e-5)
    states = torch.randn(1, 16, model.inner_dim)
    blocks = model.proj_out(states).unflatten(-1, (2, 2, 16))  # row, column, channel
    blocks = blocks.permute(0, 1, 4, 2, 3).flatten(2)
    torch.testing.assert_close(blocks, teacher.proj_out(states), rtol=0, atol=1e-5)


def test_all_tokens_as_a_sample_are_the_whole(encoders, teacher):
    """A sample of every token must give the stock forward's result, in the order of blocks."""
    model = sd3.build_transformer().requires_grad_(False)
    sd3.start_from_flux(model, teacher, single=3)
    noisy, t = torch.randn(1, 1024, 64), torch.tensor([0.7])
    pooled, words, _ = encoders(TEXTS[:1], 32)
    stock = model(sd3.unpack(noisy, 32), words, pooled, 1000 * t, return_dict=False)[0]
    batch = Batch(noisy, pack(stock), t, TEXTS[:1])
    losses = []
    for kept in (None, 1024):
        architecture = sd3.SD3Architecture(encoders, teacher, kept)
        architecture.prepare(model, 32)
        bias = np.random.default_rng(0)
        losses.append(architecture.loss(model, batch, bias).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4, abs=1e-9)


def test_sampled_keys_count_for_all():
    weights = sd3.sample_bias(256, 3).exp()
    torch.testing.assert_close(weights[0, :256].sum(), torch.tensor(1024.0))
    assert (weights[:, 256:] == 1).all()
    assert weights[5, 4:8].tolist() == [1, 1, 1, 1]


def test_float32_muon_does_as_torch_s():
    torch.manual_seed(0)
    start = torch.randn(24, 48)
    pair = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    ours = Float32Muon([pair[0]], lr=0.01)
    torchs = torch.optim.Muon([pair[1]], lr=0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        gradient = torch.randn(24, 48)
        for parameter, optimizer in zip(pair, (ours, torchs), strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    moved = [parameter.detach() - start for parameter in pair]
    # torch's works in bfloat16
    assert (moved[0] - moved[1]).norm() < 0.03 * moved[1].norm()
    values = torch.linalg.svdvals(orthogonalise(torch.randn(48, 24)))
    assert 0.5 < values.min() < values.max() < 1.5


def test_a_stage_of_the_other_architecture_is_refused():
    with pytest.raises(typer.BadParameter, match="teach"):
        main(stage=["decoder"], architecture="sd3")
