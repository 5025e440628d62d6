"""The demo transformer (FLUX architecture) and its training by flow matching.

Phase 1 trains on 16x16 tokens (256 px) whose position ids are spread to the extent of 32x32;
phase 2 goes on at 32x32 tokens (512 px) with native ids and more noise.

Padding: `FluxPipeline` feeds the text unmasked and padded to up to 512 tokens. All padding is one
vector at one position, so n copies act as one copy whose attention score is higher by log(n). The
training therefore uses 32 text tokens and adds to the scores of padding what a padding of random
length would, at no cost.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import nn
from tqdm import tqdm

from clear_dit.demo.captions import Scene, caption
from clear_dit.demo.checkpoint import load_checkpoint, save_checkpoint
from clear_dit.demo.muon import FAST_BFLOAT16, Float32Muon
from clear_dit.demo.text import WIDTH, TextEncoders

TEXT_LENGTH = 32
NATIVE_GRID = 32  # tokens a side at 512 px
_LONGEST_PADDING = 505
_EMPTY_CAPTION, _PARTIAL_CAPTION = 0.1, 0.08
Forward = Callable[..., tuple[torch.Tensor]]


@dataclass(frozen=True)
class Phase:
    """One training phase; rates are peaks, logit(t) has mean `noise_mean`."""

    name: str
    grid: int
    steps: int
    batch: int
    muon_rate: float
    adam_rate: float
    noise_mean: float
    decay_from: float  # share of the steps after which the rates fall linearly to zero
    noise_spread: float = 1.0
    average_decay: float = 0.999


class PlainAttention:
    """FLUX's full attention as two matrix products and a softmax.

    For training on CPUs only: there, the backward pass of PyTorch's fused attention in bfloat16
    takes two to three times as long as this. Same arguments as `FluxAttnProcessor`.
    """

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        def heads(states: torch.Tensor) -> torch.Tensor:
            return states.unflatten(-1, (-1, attn.head_dim))  # [b, s, heads, head_dim]

        q = attn.norm_q(heads(attn.to_q(hidden_states)).float())
        k = attn.norm_k(heads(attn.to_k(hidden_states)).float())
        v = heads(attn.to_v(hidden_states))
        if encoder_hidden_states is not None:
            text_q = attn.norm_added_q(heads(attn.add_q_proj(encoder_hidden_states)).float())
            text_k = attn.norm_added_k(heads(attn.add_k_proj(encoder_hidden_states)).float())
            text_v = heads(attn.add_v_proj(encoder_hidden_states))
            q, k, v = (torch.cat(p, 1) for p in ((text_q, q), (text_k, k), (text_v, v)))
        q = apply_rotary_emb(q, image_rotary_emb, sequence_dim=1)
        k = apply_rotary_emb(k, image_rotary_emb, sequence_dim=1)
        b, _, h, d = q.shape
        q, k, v = (x.transpose(1, 2).flatten(0, 1).to(v.dtype) for x in (q, k, v))
        scores = torch.bmm(q, k.transpose(1, 2)).unflatten(0, (b, h)) * d**-0.5
        if attention_mask is not None:
            scores = scores + attention_mask
        weights = scores.float().softmax(-1).to(v.dtype).flatten(0, 1)
        output = torch.bmm(weights, v).unflatten(0, (b, h)).transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return output
        split = encoder_hidden_states.shape[1]
        image = attn.to_out[1](attn.to_out[0](output[:, split:]))
        return image, attn.to_add_out(output[:, :split])


def build_transformer() -> FluxTransformer2DModel:
    """A new transformer of 5.5M parameters whose blocks start as the identity (adaLN-zero)."""
    model = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=64,
        num_attention_heads=3,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(8, 28, 28),
    )
    for name, module in model.named_modules():
        modulates = name.endswith(("norm1.linear", "norm1_context.linear", "norm.linear"))
        if modulates or name in ("norm_out.linear", "proj_out"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return model


def image_ids(grid: int) -> torch.Tensor:
    """Position ids [grid * grid, 3] of a square image, spread to the native extent."""
    scale = NATIVE_GRID / grid
    position = torch.arange(grid) * scale + (scale - 1) / 2
    rows, columns = torch.meshgrid(position, position, indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """[b, c, 2h, 2w] -> tokens [b, h * w, 4c], in the order of `FluxPipeline`."""
    b, c, h, w = latents.shape
    blocks = latents.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return blocks.reshape(b, (h // 2) * (w // 2), 4 * c)


def padding_bias(real: torch.Tensor, image_tokens: int, multiplicity: torch.Tensor) -> torch.Tensor:
    """Additive attention mask [b, 1, 1, text + image] that makes the padding count `multiplicity`.

    real: [b, text] bool, true for words; multiplicity: [b], how many padding tokens to act as.
    """
    padding = ~real
    share = multiplicity / padding.sum(1).clamp_min(1)
    bias = torch.zeros(real.shape[0], real.shape[1] + image_tokens)
    bias[:, : real.shape[1]] = padding * share.log()[:, None]
    return bias[:, None, None]


def make_optimizers(model: nn.Module, phase: Phase) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of attention and feed-forward, AdamW for everything else."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inner = "blocks" in name and "norm" not in name and parameter.ndim == 2
        (matrices if inner else others).append(parameter)
    return [
        torch.optim.Muon(
            matrices, lr=phase.muon_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
        )
        if FAST_BFLOAT16
        else Float32Muon(matrices, lr=phase.muon_rate),
        torch.optim.AdamW(others, lr=phase.adam_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate_factor(step: int, phase: Phase) -> float:
    """The learning rate at `step` as a share of its peak: warm-up, flat, linear decay."""
    left = (1 - step / phase.steps) / (1 - phase.decay_from)
    return min(1.0, (step + 1) / 100, left)


def draw_texts(scenes: list[Scene], rng: np.random.Generator) -> list[str]:
    """A random caption for each scene; some partial, some empty (for classifier-free guidance)."""
    texts = []
    for scene in scenes:
        kind = rng.random()
        partial = kind < _EMPTY_CAPTION + _PARTIAL_CAPTION
        texts.append("" if kind < _EMPTY_CAPTION else caption(scene, rng, partial))
    return texts


def draw_multiplicity(batch: int, rng: np.random.Generator) -> torch.Tensor:
    """How many padding tokens each text has, [batch]: log-uniform, up to the longest padding."""
    return torch.from_numpy(np.exp(rng.uniform(0, math.log(_LONGEST_PADDING), batch))).float()


class Batch(NamedTuple):
    """What a training step learns from."""

    noisy: torch.Tensor  # tokens [b, n, 64]
    velocity: torch.Tensor  # the target, [b, n, 64]: noise minus image, or as a teacher says
    t: torch.Tensor  # noise levels [b], in (0, 1)
    texts: list[str]


class Architecture(Protocol):
    """What `train_transformer` asks of a kind of transformer."""

    def build(self) -> Any:
        """A new transformer."""

    def prepare(self, model: Any, grid: int) -> None:
        """Make `model` ready to be trained on images of grid x grid tokens."""

    def loss(self, forward: Forward, batch: Batch, rng: np.random.Generator) -> torch.Tensor:
        """The loss of `forward` on `batch`; rng: for whatever else is drawn."""


class FluxArchitecture:
    """The demo's first transformer, trained from nothing."""

    def __init__(self, encoders: TextEncoders) -> None:
        self.encoders = encoders

    def build(self) -> FluxTransformer2DModel:
        return build_transformer()

    def prepare(self, model: FluxTransformer2DModel, grid: int) -> None:
        model.set_attn_processor(PlainAttention())

    def loss(self, forward: Forward, batch: Batch, rng: np.random.Generator) -> torch.Tensor:
        noisy, velocity, t, texts = batch
        with torch.no_grad():
            pooled, words, real = self.encoders(texts, TEXT_LENGTH)
        bias = padding_bias(real, noisy.shape[1], draw_multiplicity(len(texts), rng))
        with torch.autocast("cpu", torch.bfloat16):
            predicted = forward(
                hidden_states=noisy,
                encoder_hidden_states=words,
                pooled_projections=pooled,
                timestep=t,
                img_ids=image_ids(math.isqrt(noisy.shape[1])),
                txt_ids=torch.zeros(TEXT_LENGTH, 3),
                joint_attention_kwargs={"attention_mask": bias.bfloat16()},
                return_dict=False,
            )[0]
        return (predicted.float() - velocity).square().mean()


class FlowBatches:
    """Draws batches of flow matching from latent `tokens` [n, grid * grid, 64] and their scenes."""

    def __init__(self, phase: Phase, tokens: np.ndarray, scenes: list[Scene]) -> None:
        self.phase = phase
        self.tokens = tokens
        self.scenes = scenes

    def __call__(self, rng: np.random.Generator) -> Batch:
        count, size = len(self.tokens), self.phase.batch
        chosen = np.sort(rng.choice(count, size, replace=count < size))
        clean = torch.from_numpy(self.tokens[chosen].astype(np.float32))
        texts = draw_texts([self.scenes[i] for i in chosen], rng)
        # Evenly spread quantiles of the noise level lower the variance of the loss.
        quantile = (torch.arange(size) + torch.rand(size)) / size
        normal = torch.special.ndtri(quantile.clamp(1e-3, 1 - 1e-3))
        level = self.phase.noise_mean + self.phase.noise_spread * normal
        t = torch.sigmoid(level)[torch.randperm(size)]
        noise = torch.randn_like(clean)
        return Batch(clean + t[:, None, None] * (noise - clean), noise - clean, t, texts)


def train_transformer(
    phase: Phase,
    batches: Callable[[np.random.Generator], Batch],
    architecture: Architecture,
    checkpoint: Path,
    initial: dict[str, torch.Tensor] | None = None,
    compile_model: bool = True,
    save_every: int = 100,
) -> tuple[Any, list[float]]:
    """Train one phase on what `batches` draws; (averaged weights, losses).

    Resumes from `checkpoint` where it exists, else starts from `initial` or new weights.
    """
    torch.manual_seed(0)
    model = architecture.build()
    if initial is not None:
        model.load_state_dict(initial)
    average = copy.deepcopy(model).requires_grad_(False)
    muon, adam = make_optimizers(model, phase)
    start, losses = load_checkpoint(checkpoint, model=model, average=average, muon=muon, adam=adam)
    if start >= phase.steps:
        return average, losses
    architecture.prepare(model, phase.grid)
    forward: Forward = torch.compile(model, dynamic=False) if compile_model else model
    bar = tqdm(range(start, phase.steps), desc=phase.name, initial=start, total=phase.steps)
    for step in bar:
        rng = np.random.default_rng((11, phase.grid, step))
        factor = rate_factor(step, phase)
        for optimizer, peak in ((muon, phase.muon_rate), (adam, phase.adam_rate)):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
        batch = batches(rng)
        loss = architecture.loss(forward, batch, rng)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad()
        decay = min(phase.average_decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        losses.append(loss.item())
        if step % 10 == 0:
            bar.set_postfix(loss=f"{np.mean(losses[-50:]):.4f}", refresh=False)
        if (step + 1) % save_every == 0 or step + 1 == phase.steps:
            save_checkpoint(
                checkpoint, step + 1, losses, model=model, average=average, muon=muon, adam=adam
            )
    return average, losses
