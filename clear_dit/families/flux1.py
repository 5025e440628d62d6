"""FLUX.1: 19 double and 38 single blocks, text first, position ids for text and image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..attention.grid import layout_from_ids, reference_grids, unrounded_ids
from ..attention.ip_adapter import LayerProcessor
from ..attention.layout import Layout
from ..attention.positions import ExtendedPosEmbed, Extension
from ..compat import names_from
from .family import (
    BEGINS,
    ENDS,
    Family,
    Reading,
    adapter_was_unloaded,
    check_image_length,
    own_positions,
)
from .prompt_reading import PromptReading
from .recipe import Defaults, Guidance, Recipe

FluxPosEmbed: Any
(FluxPosEmbed,) = names_from("diffusers.models.transformers.transformer_flux", "FluxPosEmbed")


def read_ids(model: Any, given: Mapping[str, Any], grid: tuple[int, int] | None) -> Reading | None:
    """`Family.read` where the forward gets `img_ids` and `txt_ids`."""
    img_ids, txt_ids = given.get("img_ids"), given.get("txt_ids")
    if img_ids is None or txt_ids is None:
        return None
    if grid is None:
        layout, source = layout_from_ids(txt_ids, img_ids), "img_ids"
    else:
        layout, source = Layout(txt_ids.shape[-2], *grid), "the given grid"
    if getattr(model, "union", False):  # such a ControlNet puts a token for its mode first
        layout = layout._replace(text_length=layout.text_length + 1)
    latents = given["hidden_states"]
    check_image_length(layout, source, latents)
    exact = unrounded_ids(img_ids, layout)
    return Reading(layout, latents, changes={} if exact is None else {"img_ids": exact})


def grids_from_ids(given: Mapping[str, Any], layout: Layout) -> tuple[tuple[int, int], ...]:
    """`Family.reference_grids` where the forward gets `img_ids`."""
    img_ids = given["img_ids"]
    img_ids = img_ids[0] if img_ids.ndim == 3 else img_ids
    return reference_grids(img_ids[layout.image_length :].float())


def extend(model: Any, extension: Extension) -> dict[str, Any]:
    """`Family.extend` where `pos_embed` is a `FluxPosEmbed`."""
    positions = own_positions(model, "pos_embed", FluxPosEmbed, ExtendedPosEmbed)
    return {"pos_embed": ExtendedPosEmbed.of(positions, extension)}


def adapter_was_undone(model: Any, installed: Any) -> bool:
    """`Family.was_undone` where only IP-adapters bring other processors."""
    return adapter_was_unloaded(model, "encoder_hid_proj")


def _text_length(pipe: Any) -> dict[str, Any]:
    """`Recipe.options`: text tokens, padding included; 256 where guidance is not embedded."""
    longest = 512 if pipe.transformer.config.guidance_embeds else 256
    return {"max_sequence_length": min(longest, pipe.tokenizer_2.model_max_length)}


def _defaults(config: Mapping[str, Any], index: Mapping[str, Any]) -> Defaults | None:
    """`Recipe.defaults_of`: FLUX.1-schnell has no guidance embedding, and takes few steps."""
    if config.get("guidance_embeds"):
        return None
    return Defaults(size=1024, radius=16, steps=4, guidance=1.0)


FAMILY = Family(
    name="flux1",
    title="FLUX.1 (dev, schnell, Kontext, Fill)",
    transformer="FluxTransformer2DModel",
    stacks=("transformer_blocks", "single_transformer_blocks"),
    processors={
        "FluxAttnProcessor": LayerProcessor,
        "FluxIPAdapterAttnProcessor": LayerProcessor,
    },
    was_undone=adapter_was_undone,
    read=read_ids,
    reference_grids=grids_from_ids,
    order="text, image, references",
    grid_from="img_ids, or the rotary table",
    heads="24 x 128",
    positions="no limit: sine and cosine of any position",
    extend=extend,
    recipe=Recipe(
        pipelines=("FluxPipeline",),
        defaults=Defaults(size=1024, radius=16, steps=28, guidance=3.5),
        ntk_factor=10.0,
        guidance=Guidance("true_cfg_scale", negative=""),
        options=_text_length,
        prompts=lambda pipe: PromptReading(pipe.recipe.given_length(pipe), "tokenizer_2"),
        defaults_of=_defaults,
    ),
    proportional=True,
    weights="FLUX.1-dev and FLUX.1-schnell: Huage001/CLEAR",
    serves_fused=True,
    chunked=True,
    wide={
        "time_text_embed.*": BEGINS,
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
