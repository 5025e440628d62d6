"""FLUX.2: double blocks and parallel single blocks, text first, ids of four numbers.

A single block projects query, key, value and the feed-forward's input in one product, and both
outputs in another. The rotary table is FLUX.1's, with theta 2000.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..attention.axes import Axis, cos_and_sin, of_tokens
from ..attention.norm_rope import Rotary
from ..attention.positions import Extension
from ..compat import names_from
from ..kernels.two_positions import Rotated
from .family import BEGINS, ENDS, MODULATES, Family, Reading, own_positions
from .flux1 import grids_from_ids, read_ids
from .joint import JointProcessor, Stream
from .prompt_reading import PromptReading, user_message
from .recipe import Defaults, Guidance, Latents, Recipe

Flux2PosEmbed: Any
(Flux2PosEmbed,) = names_from("diffusers.models.transformers.transformer_flux2", "Flux2PosEmbed")


class Flux2Processor(JointProcessor):
    """In the place of `Flux2AttnProcessor`: a double block."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Image and text, (batch, tokens, channels) each; arguments are the stock processor's."""
        self._refuse_foreign_settings(attention_mask)
        assert image_rotary_emb is not None
        linears: tuple[Any, ...] = (attn.to_q, attn.to_k, attn.to_v)
        text_linears: tuple[Any, ...] = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        if attn.fused_projections:
            linears, text_linears = (attn.to_qkv,), (attn.to_added_qkv,)
        image, text = self.attend(
            attn,
            hidden_states,
            Stream(linears, (attn.norm_q, attn.norm_k), attn.head_dim),
            encoder_hidden_states,
            Stream(text_linears, (attn.norm_added_q, attn.norm_added_k), attn.head_dim),
            image_rotary_emb,
            image_rotary_emb[0],
        )
        return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(text)


class _KeyValue(Stream):
    """A stream whose neighbours send key and value, side by side, instead of tokens.

    That is twice the bytes, but the one product that makes them makes the feed-forward's input too.
    """

    def key_value(self, tokens: torch.Tensor) -> Rotated:
        key, value = (x.unflatten(-1, (-1, self.head_dim)) for x in tokens.chunk(2, dim=-1))
        return key, value


class Flux2ParallelProcessor(JointProcessor):
    """In the place of `Flux2ParallelSelfAttnProcessor`: a single block."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> torch.Tensor:
        """(batch, text + image, channels); arguments are the stock processor's."""
        self._refuse_foreign_settings(attention_mask)
        assert image_rotary_emb is not None
        turn = self.turn(hidden_states.shape[1], key=image_rotary_emb[0])
        projected = attn.to_qkv_mlp_proj(turn.order.to_local(hidden_states))
        # By proportion: under tensor parallelism a rank has its share of both.
        whole = 3 * attn.inner_dim + attn.mlp_hidden_dim * attn.mlp_mult_factor
        part = projected.shape[-1] * 3 * attn.inner_dim // whole
        qkv, feed_forward = projected.tensor_split([part], dim=-1)
        halo = self.send(turn, attn, qkv[..., part // 3 :])
        stream = _KeyValue((), (attn.norm_q, attn.norm_k), attn.head_dim)
        query, key, value = (x.unflatten(-1, (-1, attn.head_dim)) for x in qkv.chunk(3, dim=-1))
        out = self.attend_projected(
            turn, (query, key, value), stream, rotary=image_rotary_emb, halo=halo
        )
        out = torch.cat([out, attn.mlp_act_fn(feed_forward)], dim=-1)
        return turn.order.to_layer(attn.to_out(out))


def _read(model: Any, given: Mapping[str, Any], grid: tuple[int, int] | None) -> Reading | None:
    if given.get("kv_cache_mode") is not None:
        raise ValueError(
            "CLEAR: FLUX.2's cache of reference keys (kv_cache_mode="
            f"{given['kv_cache_mode']!r}, Flux2KleinKVPipeline) is not supported; use "
            "Flux2KleinPipeline, or call remove_clear."
        )
    return read_ids(model, given, grid)


def _log_shift(pipe: Any, tokens: int, steps: int) -> float:
    """`Recipe.mu`."""
    module = "diffusers.pipelines.flux2.pipeline_flux2"
    (compute_empirical_mu,) = names_from(module, "compute_empirical_mu")
    return float(compute_empirical_mu(image_seq_len=tokens, num_steps=steps))


def _defaults(config: Mapping[str, Any], index: Mapping[str, Any]) -> Defaults | None:
    """`Recipe.defaults_of`: FLUX.2 klein, where it is distilled."""
    if not index.get("is_distilled"):
        return None
    return Defaults(size=1024, radius=16, steps=4, guidance=1.0)


class ExtendedFlux2PosEmbed(nn.Module):
    """Stands in for `Flux2PosEmbed`; bit for bit the same with factors of 1.

    With "two" the image's rows and columns begin at `MARGIN`. Text keeps its positions, row 0 and
    column 0 and one after the other on the last axis, and reference images keep theirs.

    Args:
        stock: what it stands in for.
        extension: how positions are extended.
    """

    def __init__(self, stock: Any, extension: Extension) -> None:
        super().__init__()
        self.theta: Any = stock.theta
        self.axes_dim: Any = stock.axes_dim
        self.axes: tuple[Axis, ...] = extension.axes(self.theta, self.axes_dim, rows=1)

    def forward(self, ids: torch.Tensor) -> Rotary:
        """The table of some position ids.

        Args:
            ids: (tokens, 4): group, row, column and text position; of text or of images, as the
                model asks for them. Those of reference images differ in the first or the last.

        Returns:
            cos and sin, (tokens, k * sum(axes_dim)) each, float32; k is 1, and more with "two".
        """
        ids = ids.float()
        of_image = (ids[:, [0, 3]] == 0).all(dim=1, keepdim=True) & (ids[:, 1:3] != 0).any()
        tables = [cos_and_sin(self.axes, each) for each in of_tokens(self.axes, ids, of_image)]
        cos, sin = (torch.cat(parts, dim=-1) for parts in zip(*tables, strict=True))
        return cos, sin


def _extend(model: Any, extension: Extension) -> dict[str, Any]:
    positions = own_positions(model, "pos_embed", Flux2PosEmbed, ExtendedFlux2PosEmbed)
    return {"pos_embed": ExtendedFlux2PosEmbed(positions, extension)}


def _prompts(pipe: Any) -> PromptReading:
    """`Recipe.prompts`: dev has a system message before it."""
    if pipe.config["_class_name"].removeprefix("CLEAR") != "Flux2Pipeline":
        return PromptReading(512, template=user_message)
    return PromptReading(512, template=_dev_message, adds_special=False)


def _dev_message(tokenizer: Any, prompt: str) -> str:
    (format_input,) = names_from("diffusers.pipelines.flux2.pipeline_flux2", "format_input")
    (messages,) = format_input([prompt])
    text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    return text


_PIPELINES = ("Flux2Pipeline", "Flux2KleinPipeline", "Flux2KleinKVPipeline")

FAMILY = Family(
    name="flux2",
    title="FLUX.2 (dev, klein)",
    recipe=Recipe(
        pipelines=_PIPELINES,
        defaults=Defaults(size=1024, radius=16, steps=50, guidance=4.0),
        latents=Latents(given="rows"),
        guidance=Guidance(fixed=_PIPELINES),
        mu=_log_shift,
        defaults_of=_defaults,
        prompts=_prompts,
        rewriters=("upsample_prompt",),
        shift=7.5,  # its own at 1024 x 1024 px, in 50 steps
    ),
    transformer="Flux2Transformer2DModel",
    stacks=("transformer_blocks", "single_transformer_blocks"),
    processors={
        "Flux2AttnProcessor": Flux2Processor,
        "Flux2KVAttnProcessor": Flux2Processor,
        "Flux2ParallelSelfAttnProcessor": Flux2ParallelProcessor,
        "Flux2KVParallelSelfAttnProcessor": Flux2ParallelProcessor,
    },
    read=_read,
    reference_grids=grids_from_ids,
    order="text, image, references",
    grid_from="img_ids (four numbers: group, row, column, text position)",
    heads="48 x 128 (dev), 24 x 128 (klein 4B), 32 x 128 (klein 9B)",
    positions="no limit: sine and cosine of any position",
    extend=_extend,
    tuned=("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj"),
    serves_fused=True,
    wide={
        "time_guidance_embed.*": BEGINS,
        "context_embedder": BEGINS,
        "x_embedder": BEGINS,
        "*_modulation*.linear": MODULATES,
        "norm_out.linear": ENDS,
        "proj_out": ENDS,
    },
)
