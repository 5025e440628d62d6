"""LongCat-Image: FLUX.1's two kinds of blocks, without modulation by a pooled prompt.

The prompt is padded to a fixed length with tokens everybody sees; ids of image and reference images
begin where the prompt's end, and differ in the first number.
"""

from __future__ import annotations

from typing import Any

import torch

from ..attention.norm_rope import Rotary
from .family import Family
from .flux1 import grids_from_ids, read_ids
from .joint import JointProcessor, Stream


class LongCatProcessor(JointProcessor):
    """In the place of `LongCatImageAttnProcessor`, in double and single blocks."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Image and text, (batch, tokens, channels) each, or both in one where they came so;
        arguments are the stock processor's.
        """
        self._refuse_foreign_settings(attention_mask)
        assert image_rotary_emb is not None
        linears = (attn.to_qkv,) if attn.fused_projections else (attn.to_q, attn.to_k, attn.to_v)
        stream = Stream(linears, (attn.norm_q, attn.norm_k), attn.head_dim)
        rotary = image_rotary_emb
        if encoder_hidden_states is None:
            return self.attend(attn, hidden_states, stream, rotary=rotary, key=rotary[0])[0]
        linears = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
        if attn.fused_projections:
            linears = (attn.to_added_qkv,)
        of_text = Stream(linears, (attn.norm_added_q, attn.norm_added_k), attn.head_dim)
        image, text = self.attend(
            attn, hidden_states, stream, encoder_hidden_states, of_text, rotary, rotary[0]
        )
        return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(text)


FAMILY = Family(
    name="longcat-image",
    title="LongCat-Image (and Edit)",
    transformer="LongCatImageTransformer2DModel",
    stacks=("transformer_blocks", "single_transformer_blocks"),
    processors={"LongCatImageAttnProcessor": LongCatProcessor},
    read=read_ids,
    reference_grids=grids_from_ids,
    order="text, image, references",
    grid_from="img_ids",
    heads="24 x 128",
    positions="no limit: sine and cosine of any position",
    serves_fused=True,
)
