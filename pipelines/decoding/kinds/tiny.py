"""AutoencoderTiny, the small stand-in for several autoencoders, and the demo's own."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock
from torch import nn

from clear_dit.wrappers import unwrapped

from ..tiles import Segment
from .kind import Kind
from .kl import channels, factor_and_shift
from .layers import unknown

# A convolution 3 x 3 that zeros surround, by what `nn.Conv2d` holds of itself.
_PLAIN = {
    "kernel_size": (3, 3),
    "stride": (1, 1),
    "padding": (1, 1),
    "dilation": (1, 1),
    "groups": 1,
    "padding_mode": "zeros",
}


def decoder(vae: Any, height: int, width: int) -> list[list[Segment]]:
    """See `Kind`."""
    first = Segment(lambda x: torch.tanh(x / 3) * 3)
    layers = decoder_layers(unwrapped(vae.decoder).layers)
    return [[first, *layers, Segment(lambda x: x.mul(2).sub(1))]]


def encoder(vae: Any, height: int, width: int) -> list[list[Segment]]:
    """See `Kind`."""
    layers = map(_layer, unwrapped(vae.encoder).layers)
    return [[Segment(lambda x: x.add(1).div(2)), *layers]]


def _layer(layer: Any) -> Segment:
    match layer:
        case nn.Conv2d():
            return Segment(layer, reach=layer.kernel_size[0] // 2, down=layer.stride[0])
        case nn.Upsample(scale_factor=float(factor), mode="nearest"):
            return Segment(layer, up=int(factor))
        case nn.ReLU() | nn.SiLU() | nn.GELU() | nn.Mish():
            return Segment(layer)
        case AutoencoderTinyBlock():
            return Segment(layer, reach=3)
    raise unknown(layer)


def decoder_layers(layers: Iterable[Any]) -> Iterator[Segment]:
    """Each by itself, but for an enlargement with the convolution that it is for."""
    fused = False
    for layer, after in itertools.pairwise([*layers, None]):
        if fused:
            fused = False
        elif _is_twofold(layer) and _is_plain(after):
            fused = True
            yield _enlarging(layer, after)
        else:
            yield _layer(layer)


def _is_twofold(layer: Any) -> bool:
    return isinstance(layer, nn.Upsample) and (layer.scale_factor, layer.mode) == (2, "nearest")


def _is_plain(layer: Any) -> bool:
    return type(layer) is nn.Conv2d and _PLAIN.items() <= vars(layer).items()


def _enlarging(upsample: nn.Upsample, conv: nn.Conv2d) -> Segment:
    """Twice the size by the nearest pixel, then a convolution, on a CPU as a transposed one.

    Of the nine products for a pixel those with the same neighbour are one, which leaves four.
    """

    def run(x: torch.Tensor) -> torch.Tensor:
        weight = conv.weight
        # Hooks may have put the weight elsewhere, until the layer is called.
        if x.device.type != "cpu" or (weight.device, weight.dtype) != (x.device, x.dtype):
            return conv(upsample(x))
        exact = torch.promote_types(weight.dtype, torch.float32)
        wide = weight.to(exact).flip(2, 3).transpose(0, 1)
        for dim in (2, 3):
            none = torch.zeros_like(wide.narrow(dim, 0, 1))
            wide = torch.cat([wide, none], dim) + torch.cat([none, wide], dim)
        return F.conv_transpose2d(x, wide.to(x.dtype), conv.bias, stride=2, padding=1)

    return Segment(run, reach=1, up=2)


KIND = Kind(decoder, encoder, factor_and_shift, channels)
