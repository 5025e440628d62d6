"""AutoencoderKLQwenImage (Qwen-Image, Krea 2) and AutoencoderKLQwenImage21: videos of one frame.

Their layers have the same names but for the prefix. Statistics are those of each pixel alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from clear_dit.wrappers import unwrapped

from ..tiles import Segment
from .kind import Kind, Scaling
from .layers import (
    MODE,
    attend_channels,
    attention_segment,
    mid_block,
    split_behind_reduction,
    unknown,
)


def decoder(vae: Any, height: int, width: int) -> list[list[Segment]]:
    """See `Kind`."""
    network = unwrapped(vae.decoder)
    _check_type(network, "Decoder3d")
    if vae.config.get("patch_size") is not None:
        raise ValueError(
            f"autoencoder: a {type(vae).__name__} with patch_size={vae.config.patch_size} cannot "
            "be run in tiles."
        )
    first = [_convolution(vae.post_quant_conv), _convolution(network.conv_in)]
    first += _mid_block(network.mid_block, height, width)
    last = [segment for block in network.up_blocks for segment in _segments(block)]
    return [first, [*last, _head(network), Segment(lambda x: x.clamp(-1, 1))]]


def encoder(vae: Any, height: int, width: int) -> list[list[Segment]]:
    """See `Kind`."""
    network = unwrapped(vae.encoder)
    _check_type(network, "Encoder3d")
    segments = [_convolution(network.conv_in)]
    segments += [segment for block in network.down_blocks for segment in _segments(block)]
    segments += _mid_block(network.mid_block, height, width)
    return split_behind_reduction([*segments, _head(network), _convolution(vae.quant_conv), MODE])


def scaling(vae: Any) -> Scaling:
    """By the configuration's mean and deviation of each channel."""
    return Scaling.of_channels(vae.config.latents_mean, vae.config.latents_std)


def channels(config: Any) -> tuple[int, int]:
    """See `Kind`."""
    return config.z_dim, config.get("input_channels") or config.in_channels


def _segments(layer: Any) -> Iterator[Segment]:
    match _name(layer):
        case "ResidualBlock":
            yield _on_frame(layer, reach=2)
        case "Resample" if layer.mode.startswith("upsample"):
            yield _on_frame(layer, reach=1, up=2)
        case "Resample" if layer.mode.startswith("downsample"):
            yield _on_frame(layer, reach=2, down=2)
        case "UpBlock":
            for part in (*layer.resnets, *(layer.upsamplers or ())):
                yield from _segments(part)
        case "ResidualUpBlock":
            up, reach = (1, 0) if layer.upsampler is None else (2, 1)
            reach += 2 * len(layer.resnets)
            yield _on_frame(layer, reach=reach, up=up, first_chunk=True)
        case "ResidualDownBlock":
            down, reach = (1, 0) if layer.downsampler is None else (2, 2)
            yield _on_frame(layer, reach=reach + 2 * len(layer.resnets), down=down)
        case _:
            raise unknown(layer)


def _on_frame(layer: Any, *, reach: int, up: int = 1, down: int = 1, **options: Any) -> Segment:
    """A layer that takes and gives (1, channels, 1, height, width)."""

    def run(x: torch.Tensor) -> torch.Tensor:
        return layer(x.unsqueeze(2), **options).squeeze(2)

    return Segment(run, reach=reach, up=up, down=down)


def _convolution(layer: Any) -> Segment:
    return _on_frame(layer, reach=layer.kernel_size[-1] // 2)


def _mid_block(block: Any, height: int, width: int) -> Iterator[Segment]:
    _check_type(block, "MidBlock")

    def resnet(layer: Any) -> Segment:
        return next(_segments(layer))

    def attention(layer: Any) -> Segment:
        return attention_segment(lambda x, radius: _attend(layer, x, radius), height, width)

    return mid_block(block, resnet, attention)


def _attend(layer: Any, hidden: torch.Tensor, radius: int | None) -> torch.Tensor:
    q, k, v = layer.to_qkv(layer.norm(hidden)).chunk(3, dim=1)
    return layer.proj(attend_channels(q, k, v, radius)) + hidden


def _head(network: Any) -> Segment:
    norm, activation, conv = network.norm_out, network.nonlinearity, network.conv_out
    return _on_frame(lambda x: conv(activation(norm(x))), reach=1)


def _name(layer: Any) -> str:
    return type(layer).__name__.removeprefix("QwenImage21").removeprefix("QwenImage")


def _check_type(layer: Any, name: str) -> None:
    if _name(layer) != name:
        raise unknown(layer)


KIND = Kind(decoder, encoder, scaling, channels)
