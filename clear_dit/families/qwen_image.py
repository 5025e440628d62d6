"""Qwen-Image: 60 double blocks, text first, complex rotary tables with the image's centre at 0.

The text's positions begin where the longer half side of the image ends, so padding is cut off at
its end only: the tokens that stay keep their positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ..attention.layout import Layout
from ..attention.norm_rope import Rotary
from ..attention.text_padding import used_length
from ..compat import names_from
from .family import BEGINS, ENDS, OF_TOKENS, Family, Reading, check_image_length
from .joint import JointProcessor, Stream, Turn
from .prompt_reading import PromptReading
from .qwen_positions import ExtendedQwenEmbedRope, Shape, extend, image_shapes
from .recipe import Defaults, Guidance, Recipe

(_rotate,) = names_from(
    "diffusers.models.transformers.transformer_qwenimage", "apply_rotary_emb_qwen"
)


class QwenProcessor(JointProcessor):
    """In the place of `QwenDoubleStreamAttnProcessor2_0`."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Image and text, (batch, tokens, channels) each; arguments are the stock processor's.

        The mask of padded text is known already: the model's forward has the same.
        """
        self._refuse_foreign_settings(attention_mask)
        assert image_rotary_emb is not None
        # The shared Attention has no head_dim; under tensor parallelism a rank has fewer heads.
        head_dim = attn.inner_dim // attn.heads
        linears = attn.to_q, attn.to_k, attn.to_v
        text_linears = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
        out, text_out = self.attend(
            attn,
            hidden_states,
            Stream(linears, (attn.norm_q, attn.norm_k), head_dim),
            encoder_hidden_states,
            Stream(text_linears, (attn.norm_added_q, attn.norm_added_k), head_dim),
            image_rotary_emb,
            image_rotary_emb[0],
        )
        out = attn.to_out[1](attn.to_out[0](out.contiguous()))
        return out, attn.to_add_out(text_out.contiguous())

    def tables(self, rotary: Rotary, turn: Turn) -> Rotary:
        image, text = rotary
        return (torch.cat([text, turn.whole.image_only.to_local(image[None])[0]]),)

    def place(
        self,
        tokens: torch.Tensor,
        norm: Any,
        table: Rotary | None,
        text: torch.Tensor | None = None,
        text_norm: Any = None,
    ) -> torch.Tensor:
        assert table is not None
        tokens = tokens if norm is None else norm(tokens)
        if text is not None:
            text = text if text_norm is None else text_norm(text)
            tokens = torch.cat([text, tokens], dim=1)
        rotated: torch.Tensor = _rotate(tokens, table[0], use_real=False)
        return rotated


def _read(model: Any, given: Mapping[str, Any], grid: tuple[int, int] | None) -> Reading | None:
    """`Family.read`: img_shapes is [[(frames, rows, columns), ...references], ...batch]."""
    latents, text = given.get("hidden_states"), given.get("encoder_hidden_states")
    shapes = given.get("img_shapes")
    if latents is None or text is None or not shapes:
        return None
    if model.config.use_layer3d_rope:
        raise ValueError(
            "CLEAR: Qwen-Image-Layered is not supported: it makes several images at once, one "
            "behind the other, and CLEAR's window is one image's."
        )
    images = image_shapes(shapes)
    if isinstance(shapes, list) and any(other != shapes[0] for other in shapes):
        raise ValueError(
            f"CLEAR: all images of a batch must have one size, got img_shapes={shapes}."
        )
    frames, rows, columns = images[0]
    if frames != 1:
        raise ValueError(f"CLEAR: Qwen-Image's images have one frame, got {frames}.")
    references = sum(f * h * w for f, h, w in images[1:])
    layout = Layout(text.shape[1], rows, columns, references)
    check_image_length(layout, f"img_shapes={shapes}", latents)
    mask, changes = given.get("encoder_hidden_states_mask"), dict[str, Any]()
    if mask is not None:
        if mask.shape != text.shape[:2]:
            return None  # the model itself complains
        mask = mask.bool()
        length = used_length(mask)
        mask = mask[:, :length]
        layout = layout._replace(text_length=length)
        changes["encoder_hidden_states"] = text[:, :length]
        # The stock forward makes a mask of what is left; the processor has its own.
        changes["encoder_hidden_states_mask"] = None
    _check_positions(model, images, layout.text_length)
    return Reading(layout, latents, mask, changes)


def _reference_grids(given: Mapping[str, Any], layout: Layout) -> tuple[tuple[int, int], ...]:
    """`Family.reference_grids`."""
    _, *references = image_shapes(given["img_shapes"])
    if any(frames != 1 for frames, _, _ in references):
        raise ValueError(
            "CLEAR: references='local' is for reference images of one frame, got img_shapes="
            f"{given['img_shapes']}; use references='dense'."
        )
    return tuple((rows, columns) for _, rows, columns in references)


def _check_positions(model: Any, images: list[Shape], text_length: int) -> None:
    """The model's table of positions is finite, and slices of it past its end are just shorter."""
    if isinstance(model.pos_embed, ExtendedQwenEmbedRope):
        return
    limit = len(model.pos_embed.pos_freqs)
    furthest = max(max(rows - rows // 2, columns - columns // 2) for _, rows, columns in images)
    text_start = max(max(rows // 2, columns // 2) for _, rows, columns in images)
    if max(furthest, text_start + text_length) > limit:
        _, rows, columns = images[0]
        raise ValueError(
            f"CLEAR: Qwen-Image has {limit} positions, but {rows} x {columns} tokens with "
            f"{text_length} text tokens need {max(furthest, text_start + text_length)} (half the "
            "longer side, and the text behind it); make a smaller image, or extend the positions "
            "(rope)."
        )


FAMILY = Family(
    name="qwen-image",
    title="Qwen-Image (and Edit)",
    recipe=Recipe(
        pipelines=("QwenImagePipeline", "QwenImageEditPipeline", "QwenImageEditPlusPipeline"),
        defaults=Defaults(size=1328, radius=16, steps=50, guidance=4.0),
        widest=1.8,  # 1664 x 928 px: https://huggingface.co/Qwen/Qwen-Image
        guidance=Guidance("true_cfg_scale", negative=" "),
        prompts=lambda pipe: PromptReading(512, adds_special=False),
        shift=2.3,  # its own at 1328 x 1328 px
    ),
    transformer="QwenImageTransformer2DModel",
    stacks=("transformer_blocks",),
    processors={"QwenDoubleStreamAttnProcessor2_0": QwenProcessor},
    read=_read,
    reference_grids=_reference_grids,
    order="text, image, references",
    grid_from="img_shapes",
    heads="24 x 128",
    positions="4096: half the longer side and the text behind it, in tokens; extended, no limit: "
    "computed",
    extend=extend,
    proportional=True,
    cut=replace(OF_TOKENS, of_blocks=("modulate_index",)),
    wide={
        "time_text_embed.*": BEGINS,
        "img_in": BEGINS,
        "txt_in": BEGINS,
        "transformer_blocks.0.*": "is the first block: the one known to suffer most from 8 bits",
        "norm_out.linear": ENDS,
        "proj_out": ENDS,
    },
    modulation=(
        "transformer_blocks.*.img_mod.1",
        "transformer_blocks.*.txt_mod.1",
    ),
)
