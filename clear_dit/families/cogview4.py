"""CogView4: one stream of text and image, rotary embedding of the image only.

Positions are whole numbers up to 255 a side, to which larger images are squeezed: past 256 tokens
neighbours would share a position.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..attention.layout import Layout
from ..attention.norm_rope import Rotary
from ..compat import names_from
from .family import Family, Reading, only
from .joint import JointProcessor
from .recipe import Defaults, Latents, Recipe

(apply_rotary_emb,) = names_from("diffusers.models.embeddings", "apply_rotary_emb")
(_calculate_shift,) = names_from(
    "diffusers.pipelines.cogview4.pipeline_cogview4", "calculate_shift"
)


class CogView4Processor(JointProcessor):
    """In the place of `CogView4AttnProcessor`."""

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
        image = _projected(attn, hidden_states, image_rotary_emb)
        text = _projected(attn, encoder_hidden_states, None)
        out, text_out = self.attend_streams(image, text, key=image_rotary_emb[0])
        del image, text
        out, text_out = (attn.to_out[1](attn.to_out[0](x)) for x in (out, text_out))
        return out, text_out


def _projected(
    attn: Any, tokens: torch.Tensor, rotary: Rotary | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query and key normed and rotated, and value, (batch, tokens, heads, head_dim) each."""
    query, key, value = (
        linear(tokens).unflatten(-1, (attn.heads, -1))
        for linear in (attn.to_q, attn.to_k, attn.to_v)
    )
    query, key = (
        norm(x).to(tokens.dtype) for norm, x in ((attn.norm_q, query), (attn.norm_k, key))
    )
    if rotary is not None:
        query, key = (
            # Angles of the first half of the channels come again in the second.
            apply_rotary_emb(x, rotary, use_real_unbind_dim=-2, sequence_dim=1)
            for x in (query, key)
        )
    return query, key, value


def _read(model: Any, given: Mapping[str, Any], grid: tuple[int, int] | None) -> Reading | None:
    latents, text = given.get("hidden_states"), given.get("encoder_hidden_states")
    if latents is None or text is None:
        return None
    config = model.config
    rows, columns = (size // config.patch_size for size in latents.shape[-2:])
    row_limit, column_limit = config.rope_axes_dim
    if rows > row_limit or columns > column_limit:
        raise ValueError(
            f"CLEAR: this CogView4 model has {row_limit} x {column_limit} positions, which the "
            f"neighbours among {rows} x {columns} tokens would have to share; make a smaller "
            "image."
        )
    layout = Layout(text.shape[1], rows, columns)
    mask = given.get("attention_mask")
    if mask is None:
        return Reading(layout, latents)
    if tuple(mask.shape) != tuple(text.shape[:2]):
        return None  # the model itself complains
    # The stock processor adds such a mask to the scores as numbers, which hides nothing.
    return Reading(layout, latents, mask.bool(), {"attention_mask": None})


def _log_shift(pipe: Any, tokens: int, steps: int) -> float:
    """`Recipe.mu`: the shift itself, its scheduler being "linear"."""
    config = pipe.scheduler.config
    return float(
        _calculate_shift(
            tokens,
            config.get("base_image_seq_len", 256),
            config.get("base_shift", 0.25),
            config.get("max_shift", 0.75),
        )
    )


FAMILY = Family(
    name="cogview4",
    title="CogView4",
    recipe=Recipe(
        pipelines=("CogView4Pipeline",),
        defaults=Defaults(size=1024, radius=16, steps=50, guidance=5.0),
        latents=Latents(packed=False),
        mu=_log_shift,
        shift=3.25,  # its own at 1024 x 1024 px
        text_length=1024,
    ),
    transformer="CogView4Transformer2DModel",
    stacks=("transformer_blocks",),
    processors={"CogView4AttnProcessor": CogView4Processor},
    read=_read,
    order="text, image",
    grid_from="the latents' shape",
    heads="32 x 128",
    positions="256 tokens a side: beyond, neighbours share positions",
    repeated_blocks=False,
    unsupported=only((), "not wired up so far"),
)
