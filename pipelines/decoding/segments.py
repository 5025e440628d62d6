"""The encoders and decoders of diffusers as segments that can be run tile by tile."""

from __future__ import annotations

from importlib import import_module
from math import prod
from typing import Any

import torch.nn.functional as F

from clear_dit.wrappers import unwrapped

from .kinds.kind import Kind
from .tiles import Segment

# Class of an autoencoder in diffusers: the file of its kind, which defines KIND and is imported
# when one of the kind is met.
KINDS = {
    "AutoencoderKL": "kl",
    "AutoencoderTiny": "tiny",
    "AutoencoderKLFlux2": "flux2",
    "AutoencoderKLQwenImage": "qwen_image",
    "AutoencoderKLQwenImage21": "qwen_image",
    "AutoencoderKLHunyuanImage": "hunyuan_image",
}


def decoder_stages(vae: Any, height: int, width: int) -> list[list[Segment]]:
    """A decoder, from latents as the transformer gives them to pixels in [-1, 1].

    Args:
        vae: an autoencoder of `KINDS`.
        height, width: of the whole image, in latent pixels.

    Returns:
        One network after the other. What lies between two is as small as latents are, and dear to
        compute (the attention), so that it may be held whole.

    Raises:
        ValueError: another autoencoder, or one with a layer that is not known here.
    """
    vae = unwrapped(vae)
    kind = _kind_of(vae)
    first, *others = kind.decoder(vae, height, width)
    return [[*kind.scaling(vae).undone(), *first], *others]


def encoder_stages(vae: Any, height: int, width: int) -> list[list[Segment]]:
    """An encoder, from pixels in [-1, 1] to latents as the transformer takes them.

    Latents that have a distribution are the mode of it. Pixels without alpha are opaque where the
    autoencoder takes four channels.

    Args:
        vae: an autoencoder of `KINDS`.
        height, width: of the whole image, in latent pixels.

    Returns:
        As `decoder_stages`.

    Raises:
        ValueError: another autoencoder, or one with a layer that is not known here.
    """
    vae = unwrapped(vae)
    kind = _kind_of(vae)
    *others, last = kind.encoder(vae, height, width)
    stages = [*others, [*last, *kind.scaling(vae).applied()]]
    missing = Segment(lambda x: F.pad(x, (0, 0, 0, 0, 0, 4 - x.shape[1]), value=1.0))
    return [[missing, *stages[0]], *stages[1:]] if pixel_channels(vae) == 4 else stages


def check_autoencoder(vae: Any) -> None:
    """Refuse an autoencoder that cannot be run in tiles.

    Raises:
        ValueError: its class is none of `KINDS`, or it has a layer that is not known here.
    """
    decoder_stages(vae, 1, 1)
    encoder_stages(vae, 1, 1)


def side_factor(vae: Any) -> int:
    """How many pixels high and wide a latent pixel is: 8 for FLUX.

    Raises:
        ValueError: as `check_autoencoder`.
    """
    segments = [segment for stage in decoder_stages(vae, 1, 1) for segment in stage]
    up, down = (prod(getattr(each, name) for each in segments) for name in ("up", "down"))
    return up // down


def latent_step(vae: Any) -> int:
    """What the sides of an image are multiples of, in latent pixels: 2 for FLUX.2, else 1.

    Raises:
        ValueError: as `check_autoencoder`.
    """
    vae = unwrapped(vae)
    return _kind_of(vae).scaling(vae).patch


def latent_channels(vae: Any) -> int:
    """Channels of an autoencoder's latents: 16 for FLUX."""
    return _kind_of(unwrapped(vae)).channels(unwrapped(vae).config)[0]


def pixel_channels(vae: Any) -> int:
    """Channels of an autoencoder's images: 3, or 4 with alpha (Qwen-Image 2.1)."""
    return _kind_of(unwrapped(vae)).channels(unwrapped(vae).config)[1]


def _kind_of(vae: Any) -> Kind:
    for cls in type(vae).__mro__:  # FSDP makes a subclass
        if cls.__name__ in KINDS and cls.__module__.startswith("diffusers."):
            return import_module(f".kinds.{KINDS[cls.__name__]}", __package__).KIND
    *names, last = KINDS
    raise ValueError(
        f"autoencoder: must be diffusers' {', '.join(names)} or {last}, got {type(vae).__name__}."
    )
