"""Convolutional autoencoders of random weights: FLUX's with fewer channels, and each other kind."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanImage,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
)

# FLUX's, whatever its channels.
LIKE_FLUX = {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159}


def make_autoencoder(channels: tuple[int, ...], cls: type = AutoencoderKL, **config: Any) -> Any:
    """An autoencoder with a block for each number of channels; all but one of them halve the sides.

    Args:
        config: what else it is made of.
    """
    usual = {
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    return cls(block_out_channels=channels, **usual | config).eval()


def make_kind(name: str) -> Any:
    """An autoencoder by a name of `TINY`, of random weights and statistics; it reduces by 4."""
    torch.manual_seed(0)
    cls, config = TINY[name]
    vae = cls(**config).eval().requires_grad_(False)
    for parameter in vae.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    if isinstance(vae, AutoencoderKLFlux2):
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2)
    return vae


KL = {
    "block_out_channels": (8, 8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "latent_channels": 3,
}
STATISTICS = {"latents_mean": [0.1, -0.2, 0.3], "latents_std": [1.0, 2.0, 0.5]}
QWEN = STATISTICS | {
    "base_dim": 8,
    "z_dim": 3,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True],
}
HUNYUAN = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (32, 32, 64),
    "layers_per_block": 1,
    "spatial_compression_ratio": 4,
    "sample_size": 32,
    "scaling_factor": 0.75289,
}
TINY = {
    # SD3's, and CogView4's, which has no shift and no attention.
    "kl": (AutoencoderKL, KL | {"scaling_factor": 1.5305, "shift_factor": 0.0609}),
    "kl, no shift": (AutoencoderKL, KL | {"mid_block_add_attention": False}),
    "kl, by channels": (AutoencoderKL, KL | STATISTICS),  # GLM-Image's
    "flux2": (AutoencoderKLFlux2, KL),
    "qwen": (AutoencoderKLQwenImage, QWEN),
    "qwen21": (AutoencoderKLQwenImage21, QWEN | {"decoder_base_dim": 16}),
    "hunyuan": (AutoencoderKLHunyuanImage, HUNYUAN),
}
