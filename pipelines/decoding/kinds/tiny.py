"""AutoencoderTiny, the small stand-in for several autoencoders, and the demo's own."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock
from torch import nn

from clear_dit.wrappers import unwrapped

from ..tiles import Segment
from .kind import Kind
from .kl import channels, factor_and_shift
from .layers import unknown


def decoder(vae: Any, height: int, width: int) -> list[list[Segment]]:
    """See `Kind`."""
    first = Segment(lambda x: torch.tanh(x / 3) * 3)
    layers = map(_layer, unwrapped(vae.decoder).layers)
    return [[first, *layers, Segment(lambda x: x.mul(2).sub(1))]]


def encoder(vae: Any, height: int, width: int) -> list[list[Segment]]:
    """See `Kind`."""
    layers = map(_layer, unwrapped(vae.encoder).layers)
    return [[Segment(lambda x: x.add(1).div(2)), *layers]]


def _layer(layer: Any) -> Segment:
    match layer:
        case nn.Conv2d():
            return Segment(layer, reach=layer.kernel_size[0] // 2, down=layer.stride[0])
        case nn.Upsample(scale_factor=float(factor)):
            return Segment(layer, up=int(factor))
        case nn.ReLU() | nn.SiLU() | nn.GELU() | nn.Mish():
            return Segment(layer)
        case AutoencoderTinyBlock():
            return Segment(layer, reach=3)
    raise unknown(layer)


KIND = Kind(decoder, encoder, factor_and_shift, channels)
