"""The encoders and decoders of diffusers as segments that can be run tile by tile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from diffusers.models.unets.unet_2d_blocks import (
    AutoencoderTinyBlock,
    DownEncoderBlock2D,
    UNetMidBlock2D,
    UpDecoderBlock2D,
)
from torch import nn

from clear_dit.kernels.tiled.bands import tiled_attention
from clear_dit.kernels.window import Window
from clear_dit.wrappers import unwrapped

from .tiles import Segment

# Attention of the autoencoder: over all latent pixels up to as many as an image of 1024 x 1024
# pixels has, the largest size autoencoders are trained at; above, over a disc with as many.
WHOLE_ATTENTION = 128 * 128
ATTENTION_RADIUS = 72


def decoder_stages(vae: Any, height: int, width: int) -> list[list[Segment]]:
    """A decoder, from latents as the transformer gives them to pixels in [-1, 1].

    Args:
        vae: an AutoencoderKL or AutoencoderTiny of diffusers.
        height, width: of the whole image, in latent pixels.

    Returns:
        One network after the other. What lies between two is as small as latents are, and dear to
        compute (the attention), so that it may be held whole.

    Raises:
        ValueError: another autoencoder, or one with a layer that is not known here.
    """
    vae = unwrapped(vae)
    check_autoencoder(vae)
    scale, shift = latent_scaling(vae)
    first = [Segment(lambda x: x / scale + shift)]
    if isinstance(vae, AutoencoderTiny):
        first.append(Segment(lambda x: torch.tanh(x / 3) * 3))
        first += map(_layer, unwrapped(vae.decoder).layers)
        return [[*first, Segment(lambda x: x.mul(2).sub(1))]]
    if vae.post_quant_conv is not None:
        first.append(_layer(vae.post_quant_conv))
    decoder = unwrapped(vae.decoder)
    first += [_layer(decoder.conv_in), *_mid_block(decoder.mid_block, height, width)]
    last: list[Segment] = []
    for block in decoder.up_blocks:
        _check_type(block, UpDecoderBlock2D)
        last += map(_layer, [*block.resnets, *(block.upsamplers or ())])
    return [first, [*last, _head(decoder)]]


def encoder_stages(vae: Any, height: int, width: int) -> list[list[Segment]]:
    """An encoder, from pixels in [-1, 1] to latents as the transformer takes them.

    An AutoencoderKL's latents are the mode of their distribution.

    Args:
        vae: an AutoencoderKL or AutoencoderTiny of diffusers.
        height, width: of the whole image, in latent pixels.

    Returns:
        As `decoder_stages`.

    Raises:
        ValueError: another autoencoder, or one with a layer that is not known here.
    """
    vae = unwrapped(vae)
    check_autoencoder(vae)
    scale, shift = latent_scaling(vae)
    scaled = Segment(lambda x: (x - shift) * scale)
    if isinstance(vae, AutoencoderTiny):
        layers = unwrapped(vae.encoder).layers
        return [[Segment(lambda x: x.add(1).div(2)), *map(_layer, layers), scaled]]
    encoder = unwrapped(vae.encoder)
    layers = [encoder.conv_in]
    for block in encoder.down_blocks:
        _check_type(block, DownEncoderBlock2D)
        layers += [*block.resnets, *(block.downsamplers or ())]
    # The last layers work on latent pixels already.
    strided = [index for index, layer in enumerate(layers) if isinstance(layer, Downsample2D)]
    small = strided[-1] + 1 if strided else len(layers)
    last = [*map(_layer, layers[small:]), *_mid_block(encoder.mid_block, height, width)]
    last.append(_head(encoder))
    if vae.quant_conv is not None:
        last.append(_layer(vae.quant_conv))
    last += [Segment(lambda x: x.chunk(2, dim=1)[0]), scaled]
    return [[*map(_layer, layers[:small])], last]


def check_autoencoder(vae: Any) -> None:
    """Refuse what is not an AutoencoderKL or AutoencoderTiny as FLUX's pipelines have them.

    Raises:
        ValueError: it is something else, or normalises by spatial norms.
    """
    vae = unwrapped(vae)
    if isinstance(vae, AutoencoderTiny):
        return
    if not isinstance(vae, AutoencoderKL):
        raise ValueError(
            "autoencoder: must be diffusers' AutoencoderKL or AutoencoderTiny, got "
            f"{type(vae).__name__}."
        )
    _check_type(unwrapped(vae.encoder), Encoder)
    _check_type(unwrapped(vae.decoder), Decoder)


def side_factor(vae: Any) -> int:
    """How many pixels high and wide a latent pixel is: 8 for FLUX.

    Raises:
        ValueError: as `check_autoencoder`.
    """
    check_autoencoder(vae)
    return 2 ** (len(vae.config.block_out_channels) - 1)


def latent_scaling(vae: Any) -> tuple[float, float]:
    """(scaling factor, shift): the transformer takes (latents - shift) * factor."""
    config = vae.config
    return config.scaling_factor, config.shift_factor or 0.0


def _layer(layer: Any) -> Segment:
    """A layer that looks a known number of pixels around, with its factor."""
    match layer:
        case nn.Conv2d():
            return Segment(layer, reach=layer.kernel_size[0] // 2, down=layer.stride[0])
        case nn.Upsample(scale_factor=float(factor)):
            return Segment(layer, up=int(factor))
        case nn.ReLU() | nn.SiLU() | nn.GELU() | nn.Mish():
            return Segment(layer)
        case AutoencoderTinyBlock():
            return Segment(layer, reach=3)
        case ResnetBlock2D() if layer.upsample is None and layer.downsample is None:
            return Segment(lambda x: layer(x, None), reach=2, norms=2)
        case Upsample2D():
            return Segment(layer, reach=1, up=2)
        case Downsample2D():
            return Segment(layer, reach=2, down=2)
    raise ValueError(f"autoencoder: a {type(layer).__name__} cannot be run in tiles.")


def _mid_block(block: Any, height: int, width: int) -> Iterator[Segment]:
    _check_type(block, UNetMidBlock2D)
    yield _layer(block.resnets[0])
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        if attention is not None:
            yield _attention(attention, height, width)
        yield _layer(resnet)


def _attention(attention: Attention, height: int, width: int) -> Segment:
    everywhere = height * width <= WHOLE_ATTENTION
    radius = None if everywhere else ATTENTION_RADIUS
    return Segment(
        lambda x: _attend(attention, x, radius),
        reach=max(height, width) if everywhere else ATTENTION_RADIUS,
        norms=1,
    )


def _attend(attention: Attention, hidden: torch.Tensor, radius: int | None) -> torch.Tensor:
    """What diffusers' AttnProcessor2_0 does, over all pixels (radius None) or those of a disc."""
    height, width = hidden.shape[-2:]
    normal = attention.group_norm(hidden).flatten(2).transpose(1, 2)
    q, k, v = (
        project(normal).unflatten(-1, (attention.heads, -1))
        for project in (attention.to_q, attention.to_k, attention.to_v)
    )  # (1, pixels, heads, head_dim)
    if radius is None:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    else:
        window = Window(height, width, 0, radius)
        out = tiled_attention(q, k, v, window, scale=q.shape[-1] ** -0.5)[0]
    out = attention.to_out[0](out.flatten(2))
    out = out.transpose(1, 2).unflatten(2, (height, width)) + hidden
    return out / attention.rescale_output_factor


def _head(network: Any) -> Segment:
    _check_type(network.conv_norm_out, nn.GroupNorm)
    norm, activation, conv = network.conv_norm_out, network.conv_act, network.conv_out
    return Segment(lambda x: conv(activation(norm(x))), reach=1, norms=1)


def _check_type(layer: object, kind: type) -> None:
    if type(layer) is not kind:
        raise ValueError(
            f"autoencoder: a {type(layer).__name__} in place of a {kind.__name__} cannot be run "
            "in tiles."
        )
