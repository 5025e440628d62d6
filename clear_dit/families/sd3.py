"""Stable Diffusion 3 and 3.5: image first, no rotary embedding, a finite table of positions.

Some blocks of SD3.5-medium have a second attention, `attn2`, over the image alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..attention.layout import Layout
from ..attention.norm_rope import norm_and_rotate
from .family import Family, Reading, only
from .joint import JointProcessor


class SD3Processor(JointProcessor):
    """In the place of `JointAttnProcessor2_0`, of `attn` and of `attn2`.

    Fused projections are copies that diffusers keeps beside the others, which are taken here:
    adapters act on those.
    """

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Image and text, (batch, tokens, channels) each, or the image alone in `attn2`."""
        self._refuse_foreign_settings(attention_mask)
        head_dim = attn.inner_dim // attn.heads
        image = [
            linear(hidden_states).unflatten(-1, (-1, head_dim))
            for linear in (attn.to_q, attn.to_k, attn.to_v)
        ]
        if encoder_hidden_states is None:
            query = norm_and_rotate(image[0], attn.norm_q, None)
            key = norm_and_rotate(image[1], attn.norm_k, None)
            out, _ = self.attend_streams((query, key, image[2]))
            return attn.to_out[1](attn.to_out[0](out))
        text = [
            linear(encoder_hidden_states).unflatten(-1, (-1, head_dim))
            for linear in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        ]
        query = norm_and_rotate(image[0], attn.norm_q, None, text[0], attn.norm_added_q)
        key = norm_and_rotate(image[1], attn.norm_k, None, text[1], attn.norm_added_k)
        value = torch.cat([text[2], image[2]], dim=1)
        del image, text
        layout, _, window = self.under_way()
        out = self.attend_joint((query, key, value), layout, None, window)
        del query, key, value
        text_out, image_out = out.tensor_split([layout.text_length], dim=1)
        if not attn.context_pre_only:  # the last block has no use for text any more
            text_out = attn.to_add_out(text_out)
        return attn.to_out[1](attn.to_out[0](image_out)), text_out


def _read(model: Any, given: Mapping[str, Any], grid: tuple[int, int] | None) -> Reading | None:
    latents, text = given.get("hidden_states"), given.get("encoder_hidden_states")
    if latents is None or text is None:
        return None
    config = model.config
    rows, columns = (size // config.patch_size for size in latents.shape[-2:])
    limit = config.pos_embed_max_size
    if limit is not None and max(rows, columns) > limit:
        raise ValueError(
            f"CLEAR: this SD3 model has positions for {limit} x {limit} tokens, got {rows} x "
            f"{columns}; make a smaller image."
        )
    return Reading(Layout(text.shape[1], rows, columns, image_first=True), latents)


def _was_undone(model: Any) -> bool:
    """`Family.was_undone`.

    Loading an IP-adapter makes image_proj a submodule, unloading leaves None in its place. Fusing
    keeps the processors in a dict, which is empty when unfusing has set them again.
    """
    unloaded = model._modules.get("image_proj", model) is None
    return unloaded or getattr(model, "original_attn_processors", None) == {}


FAMILY = Family(
    name="sd3",
    title="Stable Diffusion 3, 3.5",
    transformer="SD3Transformer2DModel",
    stacks=("transformer_blocks",),
    processors={
        "JointAttnProcessor2_0": SD3Processor,
        "FusedJointAttnProcessor2_0": SD3Processor,
    },
    was_undone=_was_undone,
    read=_read,
    order="image, text",
    grid_from="the latents' shape",
    heads="38 x 64 (3.5-large), 24 x 64 (3.5-medium, 3-medium)",
    positions="192 tokens a side (3-medium, 3.5-large), 384 (3.5-medium): a table, pos_embed",
    # diffusers keeps to_q, to_k and to_v beside fused ones, and says so by another processor alone.
    serves_fused=True,
    repeated_blocks=False,
    unsupported=only((), "only FLUX.1's pipelines are wired up so far"),
)
