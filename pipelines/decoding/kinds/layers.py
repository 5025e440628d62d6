"""What the networks of several kinds have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from clear_dit.kernels.tiled.bands import tiled_attention
from clear_dit.kernels.window import Window

from ..tiles import Segment

# Attention of the autoencoder: over all latent pixels up to as many as an image of 1024 x 1024
# pixels has, the largest size autoencoders are trained at; above, over a disc with as many.
WHOLE_ATTENTION = 128 * 128
ATTENTION_RADIUS = 72

# The mode of a distribution of latents, from its mean and variance.
MODE = Segment(lambda x: x.chunk(2, dim=1)[0])


def mid_block(
    block: Any, resnet: Callable[[Any], Segment], attention: Callable[[Any], Segment]
) -> Iterator[Segment]:
    """The middle of an encoder or decoder: residual blocks, with attention between them."""
    yield resnet(block.resnets[0])
    for attend_block, resnet_block in zip(block.attentions, block.resnets[1:], strict=True):
        if attend_block is not None:
            yield attention(attend_block)
        yield resnet(resnet_block)


def attention_segment(
    run: Callable[[torch.Tensor, int | None], torch.Tensor],
    height: int,
    width: int,
    norms: int = 0,
) -> Segment:
    """Attention over all pixels, or in a large image over those of a disc.

    Args:
        run: takes hidden states and the disc's radius, None for all pixels (see `attend`).
        height, width: of the whole image, in latent pixels.
        norms: number of group norms in it.
    """
    if height * width <= WHOLE_ATTENTION:
        return Segment(lambda x: run(x, None), reach=max(height, width), norms=norms)
    radius = ATTENTION_RADIUS
    return Segment(lambda x: run(x, radius), reach=radius, norms=norms)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    height: int,
    width: int,
    radius: int | None,
) -> torch.Tensor:
    """Attention over all pixels of a tile (radius None), or those of a disc around each.

    Args:
        q, k, v: (1, height * width, heads, head_dim).

    Returns:
        (1, height * width, heads * head_dim).
    """
    if radius is None:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    else:
        window = Window(height, width, 0, radius)
        out = tiled_attention(q, k, v, window, scale=q.shape[-1] ** -0.5)[0]
    return out.flatten(2)


def attend_channels(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, radius: int | None
) -> torch.Tensor:
    """`attend` with a single head, on (1, channels, height, width)."""
    height, width = q.shape[-2:]
    q, k, v = (x.flatten(2).transpose(1, 2).unsqueeze(2) for x in (q, k, v))
    out = attend(q, k, v, height, width, radius)
    return out.transpose(1, 2).unflatten(2, (height, width))


def split_behind_reduction(network: list[Segment]) -> list[list[Segment]]:
    """An encoder as two networks: the second works on latent pixels alone."""
    reducing = [index for index, segment in enumerate(network) if segment.down > 1]
    small = reducing[-1] + 1 if reducing else 0
    return [part for part in (network[:small], network[small:]) if part]


def unknown(layer: object) -> ValueError:
    """What a layer is refused with that is not known."""
    return ValueError(f"autoencoder: a {type(layer).__name__} cannot be run in tiles.")


def check_type(layer: object, kind: type) -> None:
    """Refuse a layer that is not exactly of a class.

    Raises:
        ValueError: it is of another.
    """
    if type(layer) is not kind:
        raise ValueError(
            f"autoencoder: a {type(layer).__name__} in place of a {kind.__name__} cannot be run "
            "in tiles."
        )
