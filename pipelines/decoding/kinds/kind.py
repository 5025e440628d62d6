"""What is to be known of a kind of autoencoders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..tiles import Segment


@dataclass(frozen=True)
class Scaling:
    """From an autoencoder's latents to those of the transformer: (latents - shift) * factor.

    Attributes:
        factor, shift: numbers, or tensors (1, channels, 1, 1).
        patch: side of the squares of latent pixels that are scaled as one, their pixels as
            channels of their own; the latents' sides are multiples of it.
    """

    factor: float | torch.Tensor
    shift: float | torch.Tensor
    patch: int = 1

    @classmethod
    def of_channels(cls, mean: Sequence[float], deviation: Sequence[float]) -> Scaling:
        """To mean 0 and deviation 1 in each channel."""
        factor, shift = (torch.tensor(each).view(1, -1, 1, 1) for each in (deviation, mean))
        return cls(1 / factor, shift)

    def applied(self) -> list[Segment]:
        """To the autoencoder's latents."""
        return self._on_patches(lambda x: (x - _like(x, self.shift)) * _like(x, self.factor))

    def undone(self) -> list[Segment]:
        """From the transformer's latents."""
        return self._on_patches(lambda x: x / _like(x, self.factor) + _like(x, self.shift))

    def _on_patches(self, run: Callable[[torch.Tensor], torch.Tensor]) -> list[Segment]:
        patch = self.patch
        if patch == 1:
            return [Segment(run)]
        return [
            Segment(lambda x: F.pixel_unshuffle(x, patch), down=patch),
            Segment(run),
            Segment(lambda x: F.pixel_shuffle(x, patch), up=patch),
        ]


def _like(x: torch.Tensor, scale: float | torch.Tensor) -> float | torch.Tensor:
    return scale.to(x) if isinstance(scale, torch.Tensor) else scale


@dataclass(frozen=True)
class Kind:
    """Autoencoders of one class in diffusers, or of several alike.

    Attributes:
        decoder, encoder: (vae, height, width) to networks, one after the other: from the
            autoencoder's own latents to pixels in [-1, 1], and back (the mode of their
            distribution). Height and width are the whole image's, in latent pixels. What lies
            between two networks is as small as latents are.
        scaling: of an autoencoder.
        channels: the configuration to the channels of latents and of pixels.
    """

    decoder: Callable[[Any, int, int], list[list[Segment]]]
    encoder: Callable[[Any, int, int], list[list[Segment]]]
    scaling: Callable[[Any], Scaling]
    channels: Callable[[Any], tuple[int, int]]
