"""LongCat-Image: FLUX.1's two kinds of blocks, without modulation by a pooled prompt.

The prompt is padded to a fixed length with tokens everybody sees; ids of image and reference images
begin where the prompt's end, and differ in the first number.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..attention.axes import angles_along, of_angles, of_tokens, table_dtype
from ..attention.norm_rope import Rotary
from ..attention.positions import ExtendedPosEmbed, Extension
from ..compat import names_from
from .family import BEGINS, ENDS, Family, own_positions
from .flux1 import grids_from_ids, read_ids
from .joint import JointProcessor, Stream
from .recipe import Defaults, Guidance, Recipe

LongCatImagePosEmbed: Any
(LongCatImagePosEmbed,) = names_from(
    "diffusers.models.transformers.transformer_longcat_image", "LongCatImagePosEmbed"
)


class LongCatProcessor(JointProcessor):
    """In the place of `LongCatImageAttnProcessor`, in double and single blocks."""

    def __call__(
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


class ExtendedLongCatPosEmbed(ExtendedPosEmbed):
    """Stands in for `LongCatImagePosEmbed`; bit for bit the same with factors of 1.

    Text lies on the diagonal of rows and columns, and images all begin where it may end. What
    changes is how far a token of an image is from that beginning; the beginning itself and text
    have the model's frequencies. With "two" reference images (groups other than 1) keep their
    positions.
    """

    def forward(self, ids: torch.Tensor) -> Rotary:
        """cos and sin, (text + images, k * sum(axes_dim)) each; k is 1, and more with "two".

        Args:
            ids: (text + images, 3): group, row and column of every token; text is of group 0.
        """
        ids = ids.float()
        of_images = ids[:, :1] != 0
        begins = torch.where(of_images, ids[of_images.flatten()][:1], ids)
        gain = self.extension.gain(len(ids))
        tables = [
            of_angles(self._angles(begins, offsets))
            for offsets in of_tokens(self.axes, ids - begins, ids[:, :1] == 1)
        ]
        cos, sin = (torch.cat(parts, dim=1) * gain for parts in zip(*tables, strict=True))
        return cos, sin

    def _angles(self, begins: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        dtype = table_dtype(offsets.device)
        trained = [replace(axis, method="none") for axis in self.axes]
        true, as_trained, here = (
            torch.cat(angles_along(axes, positions.unbind(dim=1), dtype), dim=1)
            for axes, positions in (
                (trained, begins + offsets),
                (trained, offsets),
                (self.axes, offsets),
            )
        )
        return true + (here - as_trained)  # nothing is added where frequencies are the same


def _extend(model: Any, extension: Extension) -> dict[str, Any]:
    positions = own_positions(model, "pos_embed", LongCatImagePosEmbed, ExtendedLongCatPosEmbed)
    return {"pos_embed": ExtendedLongCatPosEmbed.of(positions, extension)}


FAMILY = Family(
    name="longcat-image",
    title="LongCat-Image (and Edit)",
    recipe=Recipe(
        pipelines=("LongCatImagePipeline",),
        defaults=Defaults(size=1024, radius=16, steps=50, guidance=4.5),
        guidance=Guidance(negative=""),  # its own is one for all prompts, and fits one alone
        prompts=lambda pipe: None,
        rewriters=("rewire_prompt",),
    ),
    transformer="LongCatImageTransformer2DModel",
    stacks=("transformer_blocks", "single_transformer_blocks"),
    processors={"LongCatImageAttnProcessor": LongCatProcessor},
    read=read_ids,
    reference_grids=grids_from_ids,
    order="text, image, references",
    grid_from="img_ids",
    heads="24 x 128",
    positions="no limit: sine and cosine of any position",
    extend=_extend,
    proportional=True,
    serves_fused=True,
    wide={
        "time_embed.*": BEGINS,
        "context_embedder": BEGINS,
        "x_embedder": BEGINS,
        "norm_out.linear": ENDS,
        "proj_out": ENDS,
    },
    modulation=(
        "transformer_blocks.*.norm1.linear",
        "transformer_blocks.*.norm1_context.linear",
        "single_transformer_blocks.*.norm.linear",
    ),
)
