"""The demo autoencoder: 8x smaller, 16 channels, no normalisation layers.

`diffusers.AutoencoderTiny` has no operation that looks at a whole image, so decoding in tiles is
exact where the tiles overlap by its receptive field.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from tqdm import tqdm

from clear_dit.demo.checkpoint import load_checkpoint, save_checkpoint

LATENT_CHANNELS = 16
LATENT_NOISE = 0.06  # added to latents in training: the decoder forgives small sampling errors
_CROP, _BATCH, _PEAK_RATE = 128, 8, 1.5e-3


def build_autoencoder() -> AutoencoderTiny:
    """A new autoencoder; training pulls its latents to mean 0 and variance 1 per channel."""
    return AutoencoderTiny(
        encoder_block_out_channels=(48, 48, 48, 48),
        decoder_block_out_channels=(48, 48, 48, 48),
        num_encoder_blocks=(0, 0, 2, 2),
        num_decoder_blocks=(3, 3, 2, 0),
        latent_channels=LATENT_CHANNELS,
        scaling_factor=1.0,
        shift_factor=0.0,
    ).to(memory_format=torch.channels_last)


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 [batch, height, width, 3] -> float32 [batch, 3, height, width] in [-1, 1]."""
    tensor = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)
    return (tensor.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def psnr(output: torch.Tensor, target: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [-1, 1]; the mean over the batch's errors."""
    error = (output.clamp(-1, 1) - target).float().square().mean().item()
    return 10 * math.log10(4 / max(error, 1e-12))


def _opponent(images: torch.Tensor) -> torch.Tensor:
    """RGB [b, 3, h, w] -> luminance and two colour differences, the colour weighted up."""
    r, g, b = images.float().unbind(1)
    luminance = 0.3 * r + 0.59 * g + 0.11 * b
    return torch.stack([luminance, 0.8 * (r - luminance), 0.8 * (b - luminance)], 1)


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Absolute, squared and gradient error of the difference, in luminance and colour."""
    difference = _opponent(output) - _opponent(target)
    coarse = F.avg_pool2d(difference, 4)
    down = difference[..., 1:, :] - difference[..., :-1, :]
    right = difference[..., 1:] - difference[..., :-1]
    return (
        difference.abs().mean()
        + 4 * difference.square().mean()
        + coarse.abs().mean()
        + 0.5 * (down.abs().mean() + right.abs().mean())
    )


def _latent_penalty(latents: torch.Tensor) -> torch.Tensor:
    """Distance of each channel's mean from 0 and variance from 1."""
    flat = latents.float().transpose(0, 1).flatten(1)
    return flat.mean(1).square().mean() + (flat.var(1) - 1).square().mean()


class CropSampler:
    """Random crops [batch, size, size, 3] of uint8 from stacks of images of several sizes."""

    def __init__(self, stacks: list[list[np.ndarray]], weights: list[float]) -> None:
        self.stacks = stacks
        self.weights: np.ndarray = np.asarray(weights) / sum(weights)

    def __call__(self, rng: np.random.Generator, batch: int, size: int) -> np.ndarray:
        crops = []
        for index in rng.choice(len(self.stacks), batch, p=self.weights):
            stack = self.stacks[index]
            chunk = stack[rng.integers(len(stack))]
            image = chunk[rng.integers(len(chunk))]
            top = rng.integers(image.shape[0] - size + 1)
            left = rng.integers(image.shape[1] - size + 1)
            crop = image[top : top + size, left : left + size]
            crops.append(crop[:, ::-1] if rng.random() < 0.5 else crop)
        return np.stack(crops)


def train_autoencoder(
    sampler: CropSampler, checkpoint: Path, steps: int, crop: int = _CROP, batch: int = _BATCH
) -> AutoencoderTiny:
    """Train for `steps`, resuming from `checkpoint` if it exists; return averaged weights."""
    torch.manual_seed(0)
    model = build_autoencoder()
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=_PEAK_RATE, betas=(0.9, 0.98), weight_decay=1e-4
    )
    start, losses = load_checkpoint(checkpoint, model=model, average=average, optimizer=optimizer)
    bar = tqdm(range(start, steps), desc="autoencoder", initial=start, total=steps)
    for step in bar:
        rng = np.random.default_rng((5, step))
        for group in optimizer.param_groups:
            warm, left = min(1, (step + 1) / 100), 1 - step / steps
            group["lr"] = _PEAK_RATE * warm * min(1, 1.6 * left + 0.01)
        target = to_tensor(sampler(rng, batch, crop))
        with torch.autocast("cpu", torch.bfloat16):
            latents = model.encoder(target)
            noisy = latents + LATENT_NOISE * torch.randn_like(latents)
            output = model.decoder(noisy)
        loss = reconstruction_loss(output, target) + 0.02 * _latent_penalty(latents)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            decay = min(0.995, (step + 1) / (step + 10))
            for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
                slow.lerp_(fast, 1 - decay)
        losses.append(loss.item())
        if step % 20 == 0:
            bar.set_postfix(loss=f"{np.mean(losses[-20:]):.4f}", psnr=f"{psnr(output, target):.1f}")
        if (step + 1) % 100 == 0 or step + 1 == steps:
            save_checkpoint(
                checkpoint, step + 1, losses, model=model, average=average, optimizer=optimizer
            )
    return average


def train_decoder(
    model: AutoencoderTiny,
    sampler: CropSampler,
    checkpoint: Path,
    steps: int,
    crop: int = _CROP,
    batch: int = _BATCH,
) -> AutoencoderTiny:
    """Go on with the decoder alone, so that latents in use stay valid; return averaged weights."""
    torch.manual_seed(1)
    decoder = model.decoder.requires_grad_(True)
    average = copy.deepcopy(decoder).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        decoder.parameters(), lr=_PEAK_RATE, betas=(0.9, 0.98), weight_decay=1e-4
    )
    start, losses = load_checkpoint(
        checkpoint, decoder=decoder, average=average, optimizer=optimizer
    )
    bar = tqdm(range(start, steps), desc="decoder", initial=start, total=steps)
    for step in bar:
        rng = np.random.default_rng((6, step))
        for group in optimizer.param_groups:
            group["lr"] = _PEAK_RATE * min(1, (step + 1) / 100) * (1 - step / steps)
        target = to_tensor(sampler(rng, batch, crop))
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                latents = model.encoder(target)
            output = decoder(latents + LATENT_NOISE * torch.randn_like(latents))
        loss = reconstruction_loss(output, target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        decay = min(0.995, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.parameters()), list(decoder.parameters()), 1 - decay)
        losses.append(loss.item())
        if step % 20 == 0:
            bar.set_postfix(loss=f"{np.mean(losses[-20:]):.4f}", psnr=f"{psnr(output, target):.1f}")
        if (step + 1) % 100 == 0 or step + 1 == steps:
            save_checkpoint(
                checkpoint, step + 1, losses, decoder=decoder, average=average, optimizer=optimizer
            )
    model.decoder = average
    return model
