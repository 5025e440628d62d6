import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

from clear_dit.demo.transformer import (
    NATIVE_GRID,
    Phase,
    build_transformer,
    image_ids,
    pack,
    padding_bias,
    rate_factor,
)


def test_position_ids_share_one_extent():
    native, coarse = image_ids(NATIVE_GRID), image_ids(NATIVE_GRID // 2)
    assert torch.equal(
        native, FluxPipeline._prepare_latent_image_ids(1, 32, 32, "cpu", torch.float32)
    )
    assert coarse.mean(0).tolist() == native.mean(0).tolist()
    assert coarse[0].tolist() == [0.0, 0.5, 0.5]


def test_pack_is_the_pipelines():
    latents = torch.randn(2, 16, 6, 4)
    assert torch.equal(pack(latents), FluxPipeline._pack_latents(latents, 2, 16, 6, 4))


@pytest.mark.parametrize("padding", [1, 20, 300])
def test_bias_acts_as_repeated_padding(padding):
    torch.manual_seed(0)
    model = build_transformer().eval()
    for parameter in model.parameters():  # adaLN-zero would hide the attention
        parameter.data += 0.05 * torch.randn_like(parameter)
    words, pad = torch.randn(1, 5, 128), torch.randn(1, 1, 128)
    common = {
        "hidden_states": torch.randn(1, 16, 64),
        "pooled_projections": torch.randn(1, 128),
        "timestep": torch.tensor([0.7]),
        "img_ids": image_ids(4),
        "return_dict": False,
    }
    with torch.no_grad():
        plain = model(
            encoder_hidden_states=torch.cat([words, pad.expand(1, padding, 128)], 1),
            txt_ids=torch.zeros(5 + padding, 3),
            **common,
        )[0]
        real = torch.tensor([[True] * 5 + [False] * 3])
        bias = padding_bias(real, 16, torch.tensor([float(padding)]))
        biased = model(
            encoder_hidden_states=torch.cat([words, pad.expand(1, 3, 128)], 1),
            txt_ids=torch.zeros(8, 3),
            joint_attention_kwargs={"attention_mask": bias},
            **common,
        )[0]
    assert (plain - biased).abs().max() < 1e-4 * plain.abs().max() + 1e-5


def test_rates_rise_stay_and_fall():
    phase = Phase("p", 16, 1000, 8, 1.0, 1.0, 0.0, 0.5)
    factors = np.array([rate_factor(step, phase) for step in range(1000)])
    assert factors[0] == 0.01
    assert (factors[99:500] == 1).all()
    assert factors[-1] < 0.003
    assert (np.diff(factors[500:]) < 0).all()
