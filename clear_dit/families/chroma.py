"""Chroma: FLUX.1's layers, with a mask for padded text.

diffusers' blocks make a mask over all queries and keys of it, (batch, 1, sequence, sequence): 4 GB
at 4096 px. Its pipeline gives the mask as numbers, which are then added to the scores: padded text
is not hidden at all. Here it is, as in the model's training and as with a mask of bools:
https://huggingface.co/lodestones/Chroma#tldr-masking-t5-padding-tokens-enhanced-fidelity-and-increased-stability-during-training
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..attention.ip_adapter import LayerProcessor
from ..attention.text_padding import used_length
from .family import BEGINS, ENDS, Family, Reading
from .flux1 import adapter_was_undone, extend, read_ids
from .recipe import Defaults, Guidance, Recipe


def _read(model: Any, given: Mapping[str, Any], grid: tuple[int, int] | None) -> Reading | None:
    reading = read_ids(model, given, grid)
    mask, text = given.get("attention_mask"), given.get("encoder_hidden_states")
    if reading is None or mask is None or text is None:
        return reading
    layout, batch = reading.layout, text.shape[0]
    if tuple(mask.shape) != (batch, layout.sequence_length):
        raise ValueError(
            "CLEAR: Chroma's attention_mask must be (batch, text + image) = "
            f"{(batch, layout.sequence_length)}, got {tuple(mask.shape)}."
        )
    mask = mask.bool()
    if not bool(mask[:, layout.text_length :].all()):
        raise ValueError("CLEAR: Chroma's attention_mask may hide text only, not image tokens.")
    length = used_length(mask[:, : layout.text_length])
    shorter = {
        "attention_mask": None,
        "encoder_hidden_states": text[:, :length],
        "txt_ids": given["txt_ids"][..., :length, :],
    }
    return replace(
        reading,
        layout=layout._replace(text_length=length),
        text_mask=mask[:, :length],
        changes={**reading.changes, **shorter},
    )


FAMILY = Family(
    name="chroma",
    title="Chroma",
    recipe=Recipe(
        pipelines=("ChromaPipeline",),
        defaults=Defaults(size=1024, radius=16, steps=35, guidance=5.0),
        guidance=Guidance(negative=""),
        ntk_factor=10.0,  # as FLUX.1, of which it was made
    ),
    transformer="ChromaTransformer2DModel",
    stacks=("transformer_blocks", "single_transformer_blocks"),
    processors={
        "FluxAttnProcessor": LayerProcessor,
        "FluxIPAdapterAttnProcessor": LayerProcessor,
    },
    was_undone=adapter_was_undone,
    read=_read,
    order="text, image",
    grid_from="img_ids",
    heads="24 x 128",
    positions="no limit: sine and cosine of any position",
    extend=extend,
    proportional=True,
    serves_fused=True,
    wide={
        "distilled_guidance_layer.*": BEGINS,
        "context_embedder": BEGINS,
        "x_embedder": BEGINS,
        "proj_out": ENDS,
    },
)
