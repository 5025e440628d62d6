"""FLUX.3: blocks of the image alone, of text and of reference images alone, then joint ones.

Ids are four numbers, as FLUX.2's, but rows and columns go in steps of 0.5, and reference images
come in arguments of their own and differ in the fourth. Text is padded with tokens everybody sees.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ..attention.axes import Axis
from ..attention.grid import reference_grids
from ..attention.layout import Layout
from ..attention.norm_rope import Rotary, norm_and_rotate, why_not_norm_rope
from ..attention.positions import Extension
from ..compat import names_from
from .family import BEGINS, ENDS, MODULATES, Family, Reading, own_positions
from .flux1 import read_ids
from .flux2 import ExtendedFlux2PosEmbed
from .joint import JointProcessor, Stream
from .prompt_reading import PromptReading, user_message
from .recipe import Defaults, Denoiser, Guidance, Latents, Recipe

if TYPE_CHECKING:
    from diffusers.models.transformers.transformer_flux3 import Flux3AttnProcessor, Flux3PosEmbed
else:
    Flux3AttnProcessor, Flux3PosEmbed = names_from(
        "diffusers.models.transformers.transformer_flux3", "Flux3AttnProcessor", "Flux3PosEmbed"
    )

# From row to row and from column to column, in positions.
STEP = 0.5


class Flux3Processor(JointProcessor):
    """In the place of `Flux3AttnProcessor`, in blocks of the image alone and in joint ones."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> torch.Tensor:
        """(batch, image or text + image + references, channels); arguments are the stock
        processor's.
        """
        self._refuse_foreign_settings(attention_mask)
        assert image_rotary_emb is not None
        linears = (attn.to_qkv,) if attn.fused_projections else (attn.to_q, attn.to_k, attn.to_v)
        stream = Stream(linears, (attn.norm_q, attn.norm_k), attn.head_dim)
        rotary = image_rotary_emb
        out, _ = self.attend(attn, hidden_states, stream, rotary=rotary, key=rotary[0])
        return attn.to_out[1](attn.to_out[0](out))

    def place(
        self,
        tokens: torch.Tensor,
        norm: Any,
        table: Rotary | None,
        text: torch.Tensor | None = None,
        text_norm: Any = None,
    ) -> torch.Tensor:
        """Normed and rotated in float32, and rounded once, as the fused kernel does of itself."""
        if why_not_norm_rope(tokens, norm, table) is None:
            return norm_and_rotate(tokens, norm, table)
        return norm_and_rotate(tokens.float(), norm, table).to(tokens.dtype)


class AloneProcessor(Flux3AttnProcessor):
    """The stock processor, over text or references alone, by the true positions of a table."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> torch.Tensor:
        """As the stock processor, of tables (tokens, positions * head_dim)."""
        assert image_rotary_emb is not None
        true = tuple(table[..., : attn.head_dim] for table in image_rotary_emb)
        out: torch.Tensor = super().__call__(attn, hidden_states, attention_mask, true)
        return out


def _read(model: Any, given: Mapping[str, Any], grid: tuple[int, int] | None) -> Reading | None:
    reading, ids = read_ids(model, given, grid), given.get("image_cond_ids")
    if reading is None or ids is None:
        return reading
    return replace(reading, layout=reading.layout._replace(reference_length=len(ids)))


def _reference_grids(given: Mapping[str, Any], layout: Layout) -> tuple[tuple[int, int], ...]:
    """`Family.reference_grids`."""
    return reference_grids(given["image_cond_ids"].roll(1, dims=-1).float())


class ExtendedFlux3PosEmbed(ExtendedFlux2PosEmbed):
    """Stands in for `Flux3PosEmbed`, as `ExtendedFlux2PosEmbed` does for FLUX.2's."""

    def __init__(self, stock: Any, extension: Extension) -> None:
        super().__init__(stock, extension)
        self.axes: tuple[Axis, ...] = tuple(
            replace(axis, trained_side=axis.trained_side * STEP, margin=axis.margin * STEP)
            for axis in self.axes
        )


def _extend(model: Any, extension: Extension) -> dict[str, Any]:
    positions = own_positions(model, "pos_embed", Flux3PosEmbed, ExtendedFlux3PosEmbed)
    return {"pos_embed": ExtendedFlux3PosEmbed(positions, extension)}


class _Denoiser(Denoiser):
    """A flow map has the velocity where the time it jumps to is the time itself."""

    def arguments(
        self, latents: torch.Tensor, levels: torch.Tensor, conditioning: Mapping[str, Any]
    ) -> dict[str, Any]:
        found = super().arguments(latents, levels, conditioning)
        if conditioning.get("target_timestep") is not None:
            found["target_timestep"] = found[self.time]
        return found


def _defaults(config: Mapping[str, Any], index: Mapping[str, Any]) -> Defaults | None:
    """`Recipe.defaults_of`: FLUX.3 of few steps."""
    if not config.get("flow_map"):
        return None
    return Defaults(size=1024, radius=16, steps=16, guidance=1.0)


FAMILY = Family(
    name="flux3",
    title="FLUX.3",
    recipe=Recipe(
        pipelines=("Flux3ModularPipeline", "Flux3DistilledModularPipeline"),
        defaults=Defaults(size=1024, radius=16, steps=50, guidance=3.5),
        latents=Latents(given="rows"),
        shift=6.93,  # its own, at any size
        guidance=Guidance(None, fixed=("Flux3DistilledModularPipeline",)),
        denoiser=_Denoiser(),
        several_prompts=False,
        prompts=lambda pipe: PromptReading(8192, template=user_message),
        defaults_of=_defaults,
    ),
    transformer="Flux3Transformer2DModel",
    stacks=("mode_blocks.image", "single_transformer_blocks"),
    processors={"Flux3AttnProcessor": Flux3Processor},
    read=_read,
    reference_grids=_reference_grids,
    order="text, image, references",
    grid_from="img_ids (four numbers, rows and columns in steps of 0.5)",
    heads="24 x 128",
    positions="no limit: sine and cosine of any position",
    extend=_extend,
    kept={
        "txt_mode_blocks": "attends over text alone",
        "mode_blocks.image_cond": "attends over reference images alone",
    },
    text_processors={"Flux3AttnProcessor": AloneProcessor},
    serves_fused=True,
    wide={
        "timestep_embedder.*": BEGINS,
        "x_embedders.*": BEGINS,
        "context_embedder": BEGINS,
        "*_stream_modulations.*": MODULATES,
        "norm_out.linear": ENDS,
        "proj_out": ENDS,
    },
)
