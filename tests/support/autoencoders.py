"""Convolutional autoencoders of random weights, of FLUX's kind or smaller."""

from typing import Any

from diffusers import AutoencoderKL

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
