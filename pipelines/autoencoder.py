"""Stand-in: pictures to latents and back, untiled."""

from __future__ import annotations

from typing import Any

import torch


def encode(vae: Any, pixels: torch.Tensor, *, tile_pixels: int | None = None) -> torch.Tensor:
    """(1, 3, height, width) in [-1, 1] to latents (1, channels, height / 8, width / 8)."""
    encoded = vae.encode(pixels.to(vae.device, vae.dtype))
    latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


def decode(vae: Any, latents: torch.Tensor, *, tile_pixels: int | None = None) -> torch.Tensor:
    """Latents (1, channels, height, width) to (1, 3, 8 * height, 8 * width) in [-1, 1]."""
    latents = latents / vae.config.scaling_factor + vae.config.shift_factor
    return vae.decode(latents.to(vae.device, vae.dtype), return_dict=False)[0]
