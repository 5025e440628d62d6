"""The demo's second transformer (SD3 architecture), its text encoders and its start from the first.

It keeps what the FLUX demo has learned: the text encoders, and weights of its blocks wherever the
shapes are the same (a joint block of SD3 is a double block of FLUX without rotary positions).
Positions come from SD3's own table, sines and cosines whose centre crop is 32 x 32 at 512 px.

`StableDiffusion3Pipeline` needs two CLIP encoders. The demo has one; beside it stands an untrained
one of SECOND_WIDTH channels. The pipeline joins the channels of their tokens and pads them to T5's
width; as they are SECOND_WIDTH wider, the padding is negative and cuts the untrained one's off. Of
that one, only the pooled vector reaches the transformer.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.models.attention_processor import Attention
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5EncoderModel,
)

from clear_dit.demo.autoencoder import LATENT_CHANNELS
from clear_dit.demo.text import WIDTH
from clear_dit.demo.transformer import (
    NATIVE_GRID,
    TEXT_LENGTH,
    Batch,
    FlowBatches,
    Forward,
    PlainAttention,
    draw_multiplicity,
    image_ids,
    pack,
    padding_bias,
)

SECOND_WIDTH = 8
POOLED_WIDTH = WIDTH + SECOND_WIDTH
CLIP_LENGTH = 32  # tokens of the CLIP encoders: the longest caption and some
TABLE = 64  # tokens a side of the position table: up to 1024 px
_HEADS, _HEAD_DIM = 3, 64
_LAST_BLOCK = 3  # the single block of FLUX that the last block starts from


def build_transformer() -> SD3Transformer2DModel:
    """A new transformer of 3.8M parameters and three joint blocks."""
    return SD3Transformer2DModel(
        sample_size=2 * NATIVE_GRID,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=3,
        attention_head_dim=_HEAD_DIM,
        num_attention_heads=_HEADS,
        caption_projection_dim=_HEADS * _HEAD_DIM,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=POOLED_WIDTH,
        pos_embed_max_size=TABLE,
        qk_norm="rms_norm",
    )


def unpack(tokens: torch.Tensor, rows: int) -> torch.Tensor:
    """The inverse of `pack`: [b, rows * columns, 4c] -> [b, c, 2 * rows, 2 * columns]."""
    blocks = tokens.unflatten(1, (rows, -1)).unflatten(3, (-1, 2, 2)).permute(0, 3, 1, 4, 2, 5)
    return blocks.flatten(4).flatten(2, 3)


def grow(wide: torch.Tensor, narrow: torch.Tensor) -> torch.Tensor:
    """Zeros like `wide` that begin with `narrow` along every axis."""
    grown = torch.zeros_like(wide)
    grown[tuple(slice(length) for length in narrow.shape)] = narrow
    return grown


def project_clip(clip: CLIPTextModel) -> CLIPTextModelWithProjection:
    """`clip` with a projection that changes nothing."""
    projected = CLIPTextModelWithProjection(CLIPTextConfig.from_dict(clip.config.to_dict()))
    projected.text_model.load_state_dict(clip.state_dict())
    nn.init.eye_(projected.text_projection.weight)
    return projected


def second_clip(first: CLIPTextConfig) -> CLIPTextModelWithProjection:
    """A CLIP encoder of SECOND_WIDTH channels as initialised: the pipeline needs a second one."""
    small = {"hidden_size": SECOND_WIDTH, "projection_dim": SECOND_WIDTH}
    small |= {"intermediate_size": SECOND_WIDTH, "num_attention_heads": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CLIPTextModelWithProjection(CLIPTextConfig.from_dict({**first.to_dict(), **small}))


class TextEncoders(nn.Module):
    """The text encoders of the demo in `folder`, as `StableDiffusion3Pipeline` has them."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(
            folder / "tokenizer"
        )
        self.tokenizer.model_max_length = CLIP_LENGTH
        self.tokenizer_3: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(
            folder / "tokenizer_2"
        )
        clip = CLIPTextModel.from_pretrained(folder / "text_encoder")
        self.clip: CLIPTextModelWithProjection = project_clip(clip)
        self.clip_2: CLIPTextModelWithProjection = second_clip(clip.config)
        self.t5: T5EncoderModel = T5EncoderModel.from_pretrained(folder / "text_encoder_2")
        self.eval().requires_grad_(False)

    def forward(self, captions: list[str], length: int) -> tuple[torch.Tensor, ...]:
        """Encode, with T5 at `length` tokens, as the stock pipeline does.

        Returns pooled [b, POOLED_WIDTH]; tokens [b, CLIP_LENGTH + length, WIDTH]; and which of
        them are no padding of T5, bool [b, CLIP_LENGTH + length].
        """
        pad = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        ids = self.tokenizer(captions, max_length=CLIP_LENGTH, **pad).input_ids
        outputs = [clip(ids, output_hidden_states=True) for clip in (self.clip, self.clip_2)]
        words = self.tokenizer_3(captions, max_length=length, **pad)
        pooled = torch.cat([output.text_embeds for output in outputs], -1)
        tokens = torch.cat([outputs[0].hidden_states[-2], self.t5(words.input_ids)[0]], 1)
        real = F.pad(words.attention_mask.bool(), (CLIP_LENGTH, 0), value=True)
        return pooled, tokens, real


class PlainJointAttention:
    """SD3's full attention with a mask, for training. Same arguments as `JointAttnProcessor2_0`."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        def heads(*parts: torch.Tensor) -> torch.Tensor:
            return torch.cat(parts, 1).unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        image, text = hidden_states, encoder_hidden_states
        q = torch.cat(
            [attn.norm_q(heads(attn.to_q(image))), attn.norm_added_q(heads(attn.add_q_proj(text)))],
            2,
        )
        k = torch.cat(
            [attn.norm_k(heads(attn.to_k(image))), attn.norm_added_k(heads(attn.add_k_proj(text)))],
            2,
        )
        v = heads(attn.to_v(image), attn.add_v_proj(text))
        b, h, _, d = q.shape
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        scores = torch.bmm(q * d**-0.5, k.transpose(1, 2)).unflatten(0, (b, h))
        if attention_mask is not None:
            scores = scores + attention_mask
        output = torch.bmm(scores.softmax(-1).flatten(0, 1), v).unflatten(0, (b, h))
        output = output.transpose(1, 2).flatten(2)
        split = image.shape[1]
        text = output[:, split:]
        return attn.to_out[1](attn.to_out[0](output[:, :split])), (
            text if attn.context_pre_only else attn.to_add_out(text)
        )


def start_from_flux(
    model: SD3Transformer2DModel, flux: FluxTransformer2DModel, single: int
) -> None:
    """Copy `flux` into `model`: embeddings, output, double blocks and a single one for the last.

    A single block runs attention and feed-forward side by side on one stream; as a joint block, one
    after the other, its weights serve both streams.
    """
    old, new = flux.state_dict(), model.state_dict()
    for name, value in new.items():
        if name in old:
            new[name] = grow(value, old[name])
    new["pos_embed.proj.weight"] = old["x_embedder.weight"].unflatten(1, (-1, 2, 2))
    new["pos_embed.proj.bias"] = old["x_embedder.bias"]
    for part in ("weight", "bias"):  # FLUX: channel, row, column; SD3: row, column, channel
        value = old[f"proj_out.{part}"].unflatten(0, (-1, 4))
        new[f"proj_out.{part}"] = value.transpose(0, 1).flatten(0, 1)
    width = model.inner_dim
    last = f"transformer_blocks.{len(model.transformer_blocks) - 1}"
    block = f"single_transformer_blocks.{single}"
    for part in ("weight", "bias"):
        modulation = old[f"{block}.norm.linear.{part}"]
        shift, scale, _ = modulation.chunk(3)
        new[f"{last}.norm1.linear.{part}"] = torch.cat([modulation, modulation])
        new[f"{last}.norm1_context.linear.{part}"] = torch.cat([scale, shift])
        for kind in "qkv":
            value = old[f"{block}.attn.to_{kind}.{part}"]
            new[f"{last}.attn.to_{kind}.{part}"] = value
            new[f"{last}.attn.add_{kind}_proj.{part}"] = value
        new[f"{last}.ff.net.0.proj.{part}"] = old[f"{block}.proj_mlp.{part}"]
    for kind in "qk":
        value = old[f"{block}.attn.norm_{kind}.weight"]
        new[f"{last}.attn.norm_{kind}.weight"] = value
        new[f"{last}.attn.norm_added_{kind}.weight"] = value
    out = old[f"{block}.proj_out.weight"]
    new[f"{last}.attn.to_out.0.weight"], new[f"{last}.ff.net.2.weight"] = (
        out[:, :width],
        out[:, width:],
    )
    new[f"{last}.attn.to_out.0.bias"] = torch.zeros(width)
    new[f"{last}.ff.net.2.bias"] = old[f"{block}.proj_out.bias"]
    model.load_state_dict(new)


def table_crop(model: SD3Transformer2DModel, grid: int) -> torch.Tensor:
    """The native crop of the position table, averaged to grid x grid: [1, grid * grid, width].

    A small image spans the same positions as a native one, as in the first phase of FLUX's.
    """
    native = model.pos_embed.cropped_pos_embed(2 * NATIVE_GRID, 2 * NATIVE_GRID)
    table = native.transpose(1, 2).unflatten(2, (NATIVE_GRID, NATIVE_GRID))
    return F.adaptive_avg_pool2d(table, grid).flatten(2).transpose(1, 2)


def draw_blocks(count: int, rng: np.random.Generator) -> torch.Tensor:
    """The places of `count` random blocks of 2 x 2 tokens in a native image: int [4 * count]."""
    side = NATIVE_GRID // 2
    rows, columns = np.divmod(np.sort(rng.choice(side * side, count, replace=False)), side)
    corner = 2 * rows * NATIVE_GRID + 2 * columns
    return torch.from_numpy((corner[:, None] + [0, 1, NATIVE_GRID, NATIVE_GRID + 1]).ravel())


def sample_bias(tokens: int, text: int) -> torch.Tensor:
    """Additive mask [tokens + text, tokens + text] that makes `tokens` stand for a native image.

    tokens: in blocks of four. A token sees its own block whole, and of the others only a sample,
    each of which counts for as many as are left out.
    """
    others = math.log((NATIVE_GRID**2 - 4) / (tokens - 4))
    bias = torch.zeros(tokens + text, tokens + text)
    bias[:, :tokens] = others
    block = torch.arange(tokens) // 4
    bias[:tokens, :tokens][block[:, None] == block] = 0
    return bias


class SD3Architecture:
    """The demo's second transformer: it starts from the first one and learns from it.

    teacher: the first one, which the new model's weights start from.
    kept: how many tokens of each native image a step looks at, a multiple of four; None: all.
    """

    def __init__(
        self,
        encoders: TextEncoders,
        teacher: FluxTransformer2DModel,
        kept: int | None = None,
    ) -> None:
        self.encoders = encoders
        self.teacher = teacher
        self.kept = kept

    def build(self) -> SD3Transformer2DModel:
        model = build_transformer()
        start_from_flux(model, self.teacher, single=_LAST_BLOCK)
        return model

    def prepare(self, model: SD3Transformer2DModel, grid: int) -> None:
        model.set_attn_processor(PlainJointAttention())
        self.table: torch.Tensor = table_crop(model, grid)
        self.positions: torch.Tensor = self.table
        model.pos_embed.cropped_pos_embed = lambda height, width: self.positions

    def loss(self, forward: Forward, batch: Batch, rng: np.random.Generator) -> torch.Tensor:
        noisy, velocity, t, texts = batch
        multiplicity = draw_multiplicity(len(texts), rng)
        with torch.no_grad():
            pooled, words, real = self.encoders(texts, TEXT_LENGTH)
        length, rows = noisy.shape[1], math.isqrt(noisy.shape[1])
        if self.kept is not None:
            length, rows = self.kept, 1  # nothing but attention mixes tokens: any shape will do
        # SD3 puts the image first.
        bias = padding_bias(real, length, multiplicity).roll(length, -1)
        if self.kept is not None:
            places = draw_blocks(self.kept // 4, rng)
            noisy, velocity = noisy[:, places], velocity[:, places]
            self.positions = self.table[:, places]
            bias = bias + sample_bias(length, real.shape[1])
        predicted = forward(
            hidden_states=unpack(noisy, rows),
            encoder_hidden_states=words,
            pooled_projections=pooled,
            timestep=1000 * t,
            joint_attention_kwargs={"attention_mask": bias},
            return_dict=False,
        )[0]
        return (pack(predicted) - velocity).square().mean()


@torch.no_grad()
def teach(
    teacher: FluxTransformer2DModel, encoders: TextEncoders, batch: Batch, rng: np.random.Generator
) -> torch.Tensor:
    """What `teacher` predicts for `batch`: velocities [b, n, 64]."""
    noisy, _, t, texts = batch
    pooled, words, real = encoders(texts, TEXT_LENGTH)
    real, words, pooled = real[:, CLIP_LENGTH:], words[:, CLIP_LENGTH:], pooled[:, :WIDTH]
    bias = padding_bias(real, noisy.shape[1], draw_multiplicity(len(texts), rng))
    ids = image_ids(math.isqrt(noisy.shape[1]))
    parts = []
    for one in torch.arange(len(texts)).split(1):  # long attentions of one image stay in the cache
        parts += teacher(
            hidden_states=noisy[one],
            encoder_hidden_states=words[one],
            pooled_projections=pooled[one],
            timestep=t[one],
            img_ids=ids,
            txt_ids=torch.zeros(TEXT_LENGTH, 3),
            joint_attention_kwargs={"attention_mask": bias[one]},
            return_dict=False,
        )[0]
    return torch.stack(parts)


def write_taught(
    folder: Path,
    count: int,
    batches: FlowBatches,
    encoders: TextEncoders,
    teacher: FluxTransformer2DModel,
) -> None:
    """Store `count` draws of `batches`, in whole batches, with the velocities of `teacher`.

    Resumes; `TaughtBatches` reads them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    teacher.set_attn_processor(PlainAttention())
    for index in tqdm(range(-(-count // batches.phase.batch)), "teach"):
        path = folder / f"{index:05d}.safetensors"
        if path.exists():
            continue
        rng = np.random.default_rng((13, index))
        torch.manual_seed(index)
        batch = batches(rng)
        velocity = teach(teacher, encoders, batch, rng)
        tensors = {"noisy": batch.noisy.half(), "velocity": velocity.half(), "t": batch.t}
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        save_file(tensors, temporary, metadata={"texts": json.dumps(batch.texts)})
        temporary.rename(path)


class TaughtBatches:
    """Draws batches of what `write_taught` stored in `folder`, of evenly spread noise levels."""

    def __init__(self, folder: Path, size: int) -> None:
        self.size = size
        self.texts: list[str] = []
        parts = []
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                self.texts += json.loads(file.metadata()["texts"])
                parts.append([file.get_tensor(name) for name in ("noisy", "velocity", "t")])
        noisy, velocity, t = map(torch.cat, zip(*parts, strict=True))
        self.noisy: torch.Tensor = noisy
        self.velocity: torch.Tensor = velocity
        self.t: torch.Tensor = t
        self.levels: list[np.ndarray] = np.array_split(self.t.argsort().numpy(), size)

    def __call__(self, rng: np.random.Generator) -> Batch:
        chosen = [int(rng.choice(level)) for level in self.levels]
        noisy, velocity = self.noisy[chosen].float(), self.velocity[chosen].float()
        return Batch(noisy, velocity, self.t[chosen], [self.texts[i] for i in chosen])
