"""Denoising a batch of images, each from its own seed: what the pipeline does, guidance batched.

The images are those of `CLEARFluxPipeline` for the same seeds, up to rounding, but guidance with
an empty prompt runs as one batch of twice the size instead of two passes, latents stay in float32
between the steps, and they come back packed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..compat import names_from
from ..generation.models import TOKEN_PIXELS
from .samples import Text

if TYPE_CHECKING:
    from ..pipelines.flux import CLEARFluxPipeline


def weights_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to load a model in that is to compute in `dtype`.

    On a CPU, bfloat16 is for the matrix products alone (see `autocast`): the elementwise work in
    between is faster in float32 there.
    """
    return torch.float32 if device.type == "cpu" and dtype == torch.bfloat16 else dtype


@contextmanager
def autocast(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Under which a model in `weights_dtype` computes in `dtype`."""
    if weights_dtype(dtype, device) == dtype:
        yield
    else:
        with quiet_norms(), torch.autocast(device.type, dtype):
            yield


@contextmanager
def quiet_norms() -> Iterator[None]:
    """Hide that QK-norm has float32 weights for bfloat16 inputs under autocast: as intended."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        yield


@torch.no_grad()
def encode(pipe: CLEARFluxPipeline, prompts: Sequence[str], length: int) -> Text:
    """Embeddings of prompts, padded to `length` text tokens."""
    words, pooled, _ = pipe.encode_prompt(
        prompt=list(prompts), prompt_2=None, device=pipe.device, max_sequence_length=length
    )
    return Text(words, pooled)


def initial_noise(
    pipe: CLEARFluxPipeline, seeds: Sequence[int], height: int, width: int
) -> torch.Tensor:
    """Packed noise [n, tokens, channels] float32 on the CPU, each row from its own seed."""
    channels = pipe.transformer.config.in_channels // 4
    rows, columns = (2 * size // TOKEN_PIXELS for size in (height, width))
    noise = [
        torch.randn(1, channels, rows, columns, generator=torch.Generator().manual_seed(seed))
        for seed in seeds
    ]
    return pipe._pack_latents(torch.cat(noise), len(noise), channels, rows, columns)


@torch.no_grad()
def denoise(
    pipe: CLEARFluxPipeline,
    noise: torch.Tensor,
    text: Text,
    empty: Text | None,
    *,
    height: int,
    width: int,
    steps: int,
    guidance: float,
) -> torch.Tensor:
    """Packed latents of finished images, [n, tokens, channels] float32 on the pipeline's device.

    Args:
        pipe: whose transformer and scheduler are used.
        noise: [n, tokens, channels], see `initial_noise`.
        text: n rows.
        empty: the empty prompt, one row, for a model without embedded guidance and guidance > 1;
            None for one pass.
        height, width: in pixels.
        steps, guidance: see `GenerateRequest`.
    """
    # Here, since importing pipelines makes diffusers and transformers talk; see `load_pipeline`.
    calculate_shift, retrieve_timesteps = names_from(
        "diffusers.pipelines.flux.pipeline_flux", "calculate_shift", "retrieve_timesteps"
    )
    model, scheduler, device = pipe.transformer, pipe.scheduler, pipe.device
    count, dtype = len(noise), model.dtype
    latents = noise.to(device, torch.float32)
    words, pooled = text
    if empty is not None:
        words = torch.cat([words, empty.words.expand(count, -1, -1)])
        pooled = torch.cat([pooled, empty.pooled.expand(count, -1)])
    ids = pipe._prepare_latent_image_ids(
        1, height // TOKEN_PIXELS, width // TOKEN_PIXELS, device, dtype
    )
    embedded = None
    if model.config.guidance_embeds:
        embedded = torch.full((len(words),), guidance, device=device, dtype=torch.float32)
    config = scheduler.config
    mu = calculate_shift(
        latents.shape[1],
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
    )
    sigmas = None if config.get("use_flow_sigmas") else np.linspace(1.0, 1 / steps, steps)
    timesteps, _ = retrieve_timesteps(scheduler, steps, device, sigmas=sigmas, mu=mu)
    scheduler.set_begin_index(0)
    for time in timesteps:
        velocity = model(
            hidden_states=(latents if empty is None else latents.repeat(2, 1, 1)).to(dtype),
            encoder_hidden_states=words.to(dtype),
            pooled_projections=pooled.to(dtype),
            timestep=(time / 1000).expand(len(words)).to(dtype),
            guidance=embedded,
            img_ids=ids,
            txt_ids=torch.zeros(words.shape[1], 3, device=device),
            return_dict=False,
        )[0].float()
        if empty is not None:
            asked, unasked = velocity.chunk(2)
            velocity = unasked + guidance * (asked - unasked)
        latents = scheduler.step(velocity, time, latents, return_dict=False)[0]
    return latents
