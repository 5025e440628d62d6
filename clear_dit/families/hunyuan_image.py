"""HunyuanImage 2.1: double and single blocks, image first, rotary embedding of the image only.

A token is 32 x 32 pixels. Text comes from two encoders and is padded to 1128 tokens; the model puts
the valid tokens of both before the padding. What all prompts of a batch leave empty is cut off.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..attention.axes import Axis, along_axes, angles_along, over_grid
from ..attention.layout import Layout
from ..attention.norm_rope import Rotary
from ..attention.positions import Extension
from ..attention.text_padding import used_length
from ..compat import names_from
from .family import BEGINS, ENDS, Cut, Family, Reading, own_positions
from .joint import JointProcessor, Stream, Turn, image_tables
from .prompt_reading import PromptReading
from .recipe import Defaults, Denoiser, Guidance, Latents, Recipe

HunyuanImageRotaryPosEmbed: Any
(HunyuanImageRotaryPosEmbed,) = names_from(
    "diffusers.models.transformers.transformer_hunyuanimage", "HunyuanImageRotaryPosEmbed"
)


class HunyuanImageProcessor(JointProcessor):
    """In the place of `HunyuanImageAttnProcessor`, in double and single blocks."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Image and text, (batch, tokens, channels) each; arguments are the stock processor's.

        The mask of padded text is known already: it follows from the forward's arguments.
        """
        self._refuse_foreign_settings(None)
        assert image_rotary_emb is not None
        single = attn.add_q_proj is None  # one set of projections and norms for both streams
        linears = attn.to_q, attn.to_k, attn.to_v
        stream = Stream(linears, (attn.norm_q, attn.norm_k), attn.inner_dim // attn.heads)
        text_stream = stream
        if not single:
            text_linears = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
            text_norms = attn.norm_added_q, attn.norm_added_k
            text_stream = stream._replace(linears=text_linears, norms=text_norms)
        image, text = self.attend(
            attn,
            hidden_states,
            stream,
            encoder_hidden_states,
            text_stream,
            image_rotary_emb,
            image_rotary_emb[0],
        )
        if not single:
            image = attn.to_out[1](attn.to_out[0](image))
            text = attn.to_add_out(text)
        return image, text

    def tables(self, rotary: Rotary, turn: Turn) -> Rotary:
        return image_tables(rotary, turn)


def _read(model: Any, given: Mapping[str, Any], grid: tuple[int, int] | None) -> Reading | None:
    latents, text = given.get("hidden_states"), given.get("encoder_hidden_states")
    mask = given.get("encoder_attention_mask")
    if latents is None or text is None or mask is None:
        return None
    *frame_patch, row_patch, column_patch = model.config.patch_size
    if frame_patch and latents.shape[2] != frame_patch[0]:
        raise ValueError(f"CLEAR: HunyuanImage's images have one frame, got {latents.shape[2]}.")
    rows, columns = latents.shape[-2] // row_patch, latents.shape[-1] // column_patch
    mask = mask.bool()
    length = used_length(mask)
    mask = mask[:, :length]
    changes: dict[str, Any] = {
        "encoder_hidden_states": text[:, :length],
        "encoder_attention_mask": mask,
    }
    second, second_mask = (
        given.get(name) for name in ("encoder_hidden_states_2", "encoder_attention_mask_2")
    )
    if model.context_embedder_2 is not None and second is not None:
        if second_mask is None:
            return None  # the model itself complains
        second_mask = second_mask.bool()
        if bool(second_mask.any()):
            length = used_length(second_mask)
            second_mask = second_mask[:, :length]
            changes |= {
                "encoder_hidden_states_2": second[:, :length],
                "encoder_attention_mask_2": second_mask,
            }
            # The model puts valid tokens first.
            both = torch.cat([second_mask, mask], dim=1)
            places = torch.arange(both.shape[1], device=both.device)
            mask = places < both.sum(dim=1, keepdim=True)
        else:  # no prompt quotes any text
            changes |= {"encoder_hidden_states_2": None, "encoder_attention_mask_2": None}
    layout = Layout(mask.shape[1], rows, columns, image_first=True)
    return Reading(layout, latents, mask, changes)


def _defaults(config: Mapping[str, Any], index: Mapping[str, Any]) -> Defaults | None:
    """`Recipe.defaults_of`: HunyuanImage 2.1 distilled."""
    if not config.get("guidance_embeds"):
        return None
    return Defaults(size=2048, radius=16, steps=8, guidance=3.25)


class ExtendedHunyuanImageRotaryPosEmbed(nn.Module):
    """Stands in for `HunyuanImageRotaryPosEmbed`; bit for bit the same with factors of 1.

    With "two" the image's rows and columns begin at `MARGIN`. Text is not rotated, which is
    position 0 either way.

    Args:
        stock: what it stands in for.
        extension: how positions are extended.
    """

    def __init__(self, stock: Any, extension: Extension) -> None:
        super().__init__()
        self.patch_size: Any = stock.patch_size
        self.rope_dim: Any = stock.rope_dim
        self.theta: Any = stock.theta
        self.axes: tuple[Axis, ...] = extension.axes(
            self.theta, self.rope_dim, rows=len(self.rope_dim) - 2
        )

    def forward(self, hidden_states: torch.Tensor) -> Rotary:
        """The table of an image.

        Args:
            hidden_states: latents, (batch, channels, (frames,) height, width).

        Returns:
            cos and sin, (image, k * sum(rope_dim)) each, float32; k is 1, and more with "two".
        """
        sizes = hidden_states.shape[2:]
        positions = [
            torch.arange(size // patch, dtype=torch.float32, device=hidden_states.device)
            for size, patch in zip(sizes, self.patch_size, strict=True)
        ]
        angles = torch.cat(
            [
                over_grid(angles_along(self.axes, along, torch.float32))
                for along in along_axes(self.axes, positions)
            ],
            dim=1,
        ).repeat_interleave(2, dim=1)
        return angles.cos(), angles.sin()


def _extend(model: Any, extension: Extension) -> dict[str, Any]:
    positions = own_positions(
        model, "rope", HunyuanImageRotaryPosEmbed, ExtendedHunyuanImageRotaryPosEmbed
    )
    return {"rope": ExtendedHunyuanImageRotaryPosEmbed(positions, extension)}


class _Denoiser(Denoiser):
    """Times have the latents' dtype; a mean-flow model has the velocity where both are one."""

    def arguments(
        self, latents: torch.Tensor, levels: torch.Tensor, conditioning: Mapping[str, Any]
    ) -> dict[str, Any]:
        found = super().arguments(latents, levels, conditioning)
        found[self.time] = found[self.time].to(latents.dtype)
        if conditioning.get("timestep_r") is not None:
            found["timestep_r"] = found[self.time]
        return found


FAMILY = Family(
    name="hunyuan-image",
    title="HunyuanImage 2.1",
    recipe=Recipe(
        pipelines=("HunyuanImagePipeline",),
        defaults=Defaults(size=2048, radius=16, steps=50, guidance=3.5),
        latents=Latents("grid"),
        guidance=Guidance(None, embedded="distilled_guidance_scale"),
        denoiser=_Denoiser(scale=1000.0),
        defaults_of=_defaults,
        prompts=lambda pipe: PromptReading(1000, adds_special=False),
        patch=1,
        shift=5.0,  # its own, at any size
    ),
    transformer="HunyuanImageTransformer2DModel",
    stacks=("transformer_blocks", "single_transformer_blocks"),
    processors={"HunyuanImageAttnProcessor": HunyuanImageProcessor},
    read=_read,
    order="image, text",
    grid_from="the latents' shape",
    heads="28 x 128",
    positions="no limit: sine and cosine of any position",
    extend=_extend,
    kept={"context_embedder": "attends over text alone"},
    cut=Cut(output_of="x_embedder"),
    wide={
        "context_embedder.*": BEGINS,
        "context_embedder_2.*": BEGINS,
        "time_guidance_embed.*": BEGINS,
        "norm_out.linear": ENDS,
        "proj_out": ENDS,
    },
    modulation=(
        "transformer_blocks.*.norm1.linear",
        "transformer_blocks.*.norm1_context.linear",
        "single_transformer_blocks.*.norm.linear",
    ),
)
