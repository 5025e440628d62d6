"""AutoencoderKL, as FLUX.1, SD3, Z-Image, CogView4 and many others have it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from diffusers.models.unets.unet_2d_blocks import (
    DownEncoderBlock2D,
    UNetMidBlock2D,
    UpDecoderBlock2D,
)
from torch import nn

from clear_dit.wrappers import unwrapped

from ..tiles import Segment
from .kind import Kind, Scaling
from .layers import (
    MODE,
    attend,
    attention_segment,
    check_type,
    mid_block,
    split_behind_reduction,
    unknown,
)


def decoder(vae: Any, height: int, width: int) -> list[list[Segment]]:
    """See `Kind`."""
    network = unwrapped(vae.decoder)
    check_type(network, Decoder)
    first = [] if vae.post_quant_conv is None else [_layer(vae.post_quant_conv)]
    first += [_layer(network.conv_in), *_mid_block(network.mid_block, height, width)]
    last: list[Segment] = []
    for block in network.up_blocks:
        check_type(block, UpDecoderBlock2D)
        last += map(_layer, [*block.resnets, *(block.upsamplers or ())])
    return [first, [*last, _head(network)]]


def encoder(vae: Any, height: int, width: int) -> list[list[Segment]]:
    """See `Kind`."""
    network = unwrapped(vae.encoder)
    check_type(network, Encoder)
    segments = [_layer(network.conv_in)]
    for block in network.down_blocks:
        check_type(block, DownEncoderBlock2D)
        segments += map(_layer, [*block.resnets, *(block.downsamplers or ())])
    segments += [*_mid_block(network.mid_block, height, width), _head(network)]
    if vae.quant_conv is not None:
        segments.append(_layer(vae.quant_conv))
    return split_behind_reduction([*segments, MODE])


def scaling(vae: Any) -> Scaling:
    """By channel where the configuration says so (GLM-Image), else by a factor and a shift."""
    config = vae.config
    if config.latents_mean is not None:
        return Scaling.of_channels(config.latents_mean, config.latents_std)
    return factor_and_shift(vae)


def factor_and_shift(vae: Any) -> Scaling:
    """What the configuration of most autoencoders has; those without a shift have 0."""
    return Scaling(vae.config.scaling_factor, vae.config.shift_factor or 0.0)


def channels(config: Any) -> tuple[int, int]:
    """See `Kind`."""
    return config.latent_channels, config.in_channels


def _layer(layer: Any) -> Segment:
    """A layer that looks a known number of pixels around, with its factor."""
    match layer:
        case nn.Conv2d():
            return Segment(layer, reach=layer.kernel_size[0] // 2)
        case ResnetBlock2D() if layer.upsample is None and layer.downsample is None:
            return Segment(lambda x: layer(x, None), reach=2, norms=2)
        case Upsample2D():
            return Segment(layer, reach=1, up=2)
        case Downsample2D():
            return Segment(layer, reach=2, down=2)
    raise unknown(layer)


def _mid_block(block: Any, height: int, width: int) -> Iterator[Segment]:
    check_type(block, UNetMidBlock2D)

    def attention(layer: Attention) -> Segment:
        return attention_segment(lambda x, radius: _attend(layer, x, radius), height, width, 1)

    return mid_block(block, _layer, attention)


def _attend(layer: Attention, hidden: torch.Tensor, radius: int | None) -> torch.Tensor:
    """What diffusers' AttnProcessor2_0 does, see `attend`."""
    height, width = hidden.shape[-2:]
    normal = layer.group_norm(hidden).flatten(2).transpose(1, 2)
    q, k, v = (
        project(normal).unflatten(-1, (layer.heads, -1))
        for project in (layer.to_q, layer.to_k, layer.to_v)
    )
    out = layer.to_out[0](attend(q, k, v, height, width, radius))
    out = out.transpose(1, 2).unflatten(2, (height, width)) + hidden
    return out / layer.rescale_output_factor


def _head(network: Any) -> Segment:
    check_type(network.conv_norm_out, nn.GroupNorm)
    norm, activation, conv = network.conv_norm_out, network.conv_act, network.conv_out
    return Segment(lambda x: conv(activation(norm(x))), reach=1, norms=1)


KIND = Kind(decoder, encoder, scaling, channels)
