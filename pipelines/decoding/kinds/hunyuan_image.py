"""AutoencoderKLHunyuanImage, of HunyuanImage 2.1: pixels become channels and channels pixels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_hunyuanimage import (
    HunyuanImageAttentionBlock,
    HunyuanImageDecoder2D,
    HunyuanImageDownsample,
    HunyuanImageEncoder2D,
    HunyuanImageMidBlock,
    HunyuanImageResnetBlock,
    HunyuanImageUpsample,
)

from clear_dit.wrappers import unwrapped

from ..tiles import Segment
from .kind import Kind, Scaling
from .kl import channels
from .layers import (
    MODE,
    attend_channels,
    attention_segment,
    check_type,
    mid_block,
    split_behind_reduction,
    unknown,
)


def decoder(vae: Any, height: int, width: int) -> list[list[Segment]]:
    """See `Kind`."""
    network = unwrapped(vae.decoder)
    check_type(network, HunyuanImageDecoder2D)
    first = Segment(
        lambda x: network.conv_in(x) + x.repeat_interleave(network.repeat, dim=1), reach=1
    )
    head = Segment(lambda x: _head(network, x), reach=1, norms=1)
    return [
        [first, *_mid_block(network.mid_block, height, width)],
        [*map(_layer, network.up_blocks), head],
    ]


def encoder(vae: Any, height: int, width: int) -> list[list[Segment]]:
    """See `Kind`."""
    network = unwrapped(vae.encoder)
    check_type(network, HunyuanImageEncoder2D)
    head = Segment(
        lambda x: _head(network, x) + x.unflatten(1, (-1, network.group_size)).mean(dim=2),
        reach=1,
        norms=1,
    )
    return split_behind_reduction(
        [
            Segment(network.conv_in, reach=1),
            *map(_layer, network.down_blocks),
            *_mid_block(network.mid_block, height, width),
            head,
            MODE,
        ]
    )


def scaling(vae: Any) -> Scaling:
    """By the configuration's factor.

    Raises:
        ValueError: it has none, which is the class's default and cannot be used.
    """
    factor = vae.config.scaling_factor
    if factor is None:
        raise ValueError(
            f"autoencoder: this {type(vae).__name__} has no scaling_factor; put the published "
            "model's, 0.75289, into its config.json."
        )
    return Scaling(factor, 0.0)


def _layer(layer: Any) -> Segment:
    match layer:
        case HunyuanImageResnetBlock():
            return Segment(layer, reach=2, norms=2)
        case HunyuanImageUpsample():
            return Segment(layer, reach=1, up=2)
        case HunyuanImageDownsample():
            return Segment(layer, reach=1, down=2)
    raise unknown(layer)


def _mid_block(block: Any, height: int, width: int) -> Iterator[Segment]:
    check_type(block, HunyuanImageMidBlock)

    def attention(layer: HunyuanImageAttentionBlock) -> Segment:
        return attention_segment(lambda x, radius: _attend(layer, x, radius), height, width, 1)

    return mid_block(block, _layer, attention)


def _attend(
    layer: HunyuanImageAttentionBlock, hidden: torch.Tensor, radius: int | None
) -> torch.Tensor:
    normal = layer.norm(hidden)
    q, k, v = (project(normal) for project in (layer.to_q, layer.to_k, layer.to_v))
    return layer.proj(attend_channels(q, k, v, radius)) + hidden


def _head(network: Any, hidden: torch.Tensor) -> torch.Tensor:
    return network.conv_out(network.nonlinearity(network.norm_out(hidden)))


KIND = Kind(decoder, encoder, scaling, channels)
