"""Krea 2: one stream of text and image, grouped queries, a sigmoid gate after attention.

The pipeline pads the prompt to a fixed length, in the middle of its template. Text tokens have no
positions, so what no row of the batch uses is left out wherever it stands. Reference images, which
some LoRAs are for, stand behind the image and differ from it in the first id.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..attention.grid import layout_from_ids, reference_grids, unrounded_ids
from ..attention.layout import Layout
from ..attention.norm_rope import Rotary
from ..attention.positions import ExtendedPosEmbed, Extension
from ..compat import names_from
from .family import BEGINS, ENDS, MODULATES, Cut, Family, Reading, check_image_length, own_positions
from .joint import JointProcessor, Stream
from .prompt_reading import PromptReading
from .recipe import Defaults, Guidance, Recipe, linear_shift

Krea2RotaryPosEmbed: Any
(Krea2RotaryPosEmbed,) = names_from(
    "diffusers.models.transformers.transformer_krea2", "Krea2RotaryPosEmbed"
)


class Krea2Processor(JointProcessor):
    """In the place of `Krea2AttnProcessor`."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> torch.Tensor:
        """(batch, text + image + references, channels); arguments are the stock processor's.

        The mask of padded text is known already: the model's forward has the same.
        """
        self._refuse_foreign_settings(None)
        assert image_rotary_emb is not None
        linears = attn.to_q, attn.to_k, attn.to_v
        stream = Stream(linears, (attn.norm_q, attn.norm_k), attn.head_dim)
        rotary = image_rotary_emb
        out, _ = self.attend(attn, hidden_states, stream, rotary=rotary, key=rotary[0])
        return attn.to_out[0](out * torch.sigmoid(attn.to_gate(hidden_states)))


def _read(model: Any, given: Mapping[str, Any], grid: tuple[int, int] | None) -> Reading | None:
    latents, text = given.get("hidden_states"), given.get("encoder_hidden_states")
    ids = given.get("position_ids")
    if latents is None or text is None or ids is None or ids.ndim != 2:
        return None
    length = text.shape[1]
    if grid is None:
        layout, source = layout_from_ids(ids[:length], ids[length:]), "position_ids"
    else:
        layout, source = Layout(length, *grid), "the given grid"
    check_image_length(layout, source, latents)
    changes = dict[str, Any]()
    exact = unrounded_ids(ids[length:], layout)
    if exact is not None:
        ids = changes["position_ids"] = torch.cat([ids[:length].float(), exact])
    mask = given.get("encoder_attention_mask")
    if mask is None or mask.shape != text.shape[:2]:  # of the latter the model itself complains
        return Reading(layout, latents, changes=changes)
    mask = mask.bool()
    used = mask.any(dim=0)
    used[0] |= ~used.any()
    mask, places = mask[:, used], used.nonzero().flatten()
    changes["encoder_hidden_states"] = text[:, places]
    changes["position_ids"] = torch.cat([ids[places], ids[length:]])
    # Layers over text alone need what is left of it.
    changes["encoder_attention_mask"] = None if bool(mask.all()) else mask
    return Reading(layout._replace(text_length=len(places)), latents, mask, changes)


def _reference_grids(given: Mapping[str, Any], layout: Layout) -> tuple[tuple[int, int], ...]:
    """`Family.reference_grids`."""
    return reference_grids(given["position_ids"][-layout.reference_length :].float())


def _log_shift(pipe: Any, tokens: int, steps: int) -> float:
    """`Recipe.mu`."""
    if pipe.config.is_distilled:
        return 1.15
    return linear_shift({"max_image_seq_len": 6400} | dict(pipe.scheduler.config), tokens)


def _defaults(config: Mapping[str, Any], index: Mapping[str, Any]) -> Defaults | None:
    """`Recipe.defaults_of`: Krea 2 of few steps."""
    if not index.get("is_distilled"):
        return None
    return Defaults(size=1024, radius=16, steps=8, guidance=0.0)


class ExtendedKrea2RotaryPosEmbed(ExtendedPosEmbed):
    """Stands in for `Krea2RotaryPosEmbed`, as `ExtendedPosEmbed` does for FLUX.1's."""

    def forward(self, ids: torch.Tensor) -> Rotary:
        """cos and sin, (text + image, k * sum(axes_dim)) each; k is 1, and more with "two"."""
        tables = super().forward(ids)
        return torch.cat(tables[::2], dim=1), torch.cat(tables[1::2], dim=1)


def _extend(model: Any, extension: Extension) -> dict[str, Any]:
    positions = own_positions(model, "rotary_emb", Krea2RotaryPosEmbed, ExtendedKrea2RotaryPosEmbed)
    return {"rotary_emb": ExtendedKrea2RotaryPosEmbed.of(positions, extension)}


FAMILY = Family(
    name="krea2",
    title="Krea 2",
    recipe=Recipe(
        pipelines=("Krea2Pipeline",),
        defaults=Defaults(size=1024, radius=16, steps=28, guidance=4.5),
        mu=_log_shift,
        shift=2.5,  # its own at 1024 x 1024 px
        guidance=Guidance(off=0.0),
        defaults_of=_defaults,
        # Of 512, which end with those of the template.
        prompts=lambda pipe: PromptReading(507, adds_special=False),
    ),
    transformer="Krea2Transformer2DModel",
    stacks=("transformer_blocks",),
    processors={"Krea2AttnProcessor": Krea2Processor},
    read=_read,
    reference_grids=_reference_grids,
    order="text, image, references",
    grid_from="position_ids",
    heads="48 x 128, keys and values 12 x 128",
    positions="no limit: sine and cosine of any position",
    extend=_extend,
    proportional=True,
    kept={"text_fusion": "attends over text alone"},
    cut=Cut(("hidden_states",), whole_after="final_layer"),
    wide={
        "img_in": BEGINS,
        "txt_in.*": BEGINS,
        "text_fusion.*": BEGINS,
        "time_embed.*": BEGINS,
        "time_mod_proj": MODULATES,
        "final_layer.linear": ENDS,
    },
)
