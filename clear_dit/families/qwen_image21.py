"""Qwen-Image 2.1: one stream, in which the image to be made is last and alone sees everything.

What stands before it, its prefix, is text in which reference images are embedded. A token of text
sees what came before it, a reference image that and itself, and none of them sees the image: the
prefix stays as it is, of any step, and its keys and values may be kept for the next ones. Here the
image's queries alone are local: they see the prefix and their disc.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from ..attention.layout import Layout
from ..attention.text_padding import Projected, ValidText
from ..compat import names_from
from ..kernels.window import Window
from .family import Family, Reading
from .joint import JointProcessor
from .qwen21_positions import ExtendedQwenImage21Rope, extend
from .recipe import Defaults, Denoiser, Guidance, Latents, Recipe

SLOT, _qkv = names_from(
    "diffusers.models.transformers.transformer_qwenimage21",
    "_IMG_TOKENS_PER_SLOT",
    "_qwenimage21_prepare_qkv",
)
# Positions of the model's table, and those of them that are negative.
POSITIONS, NEGATIVE = 8192, 1024
# (first token, token after the last, whether it is text) of the parts of a prefix.
Segments = list[tuple[int, int, bool]]


class QwenImage21Processor(JointProcessor):
    """In the place of `QwenImage21AttnProcessor` and of `QwenImage21FlexAttnProcessor`."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        attention_mask: Any = None,
        rotary_emb: torch.Tensor | None = None,
        layer_cache: Any = None,
        kv_cache_mode: str | None = None,
        cache_write_slice: slice | None = None,
        segments: Segments | None = None,
        key_valid: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(batch, prefix + image, channels); arguments are the stock processor's.

        Without `segments` it is (batch, image, channels), and the prefix is in the cache. The mask
        of padded text is known already, for the image: the model's forward has the same.
        """
        self._refuse_foreign_settings(None)
        if torch.compiler.is_compiling():
            (layout, window), valid_text = self.tracker.compiled(), None
        else:
            (layout, valid_text, _), window = self.tracker.told(rotary_emb), None
        query, key, value, _ = _qkv(
            attn, hidden_states, rotary_emb, layer_cache, kv_cache_mode, cache_write_slice
        )
        parts = [_causal(query, key, value, part, key_valid) for part in segments or ()]
        image = query[:, query.shape[1] - layout.image_length :]
        parts.append(self._attend_image((image, key, value), layout, valid_text, window))
        out = torch.cat(parts, dim=1).to(query.dtype)
        return attn.to_out[1](attn.to_out[0](out))

    def _attend_image(
        self,
        tensors: Projected,
        layout: Layout,
        valid_text: ValidText | None = None,
        window: Window | None = None,
    ) -> torch.Tensor:
        """Local attention of the image alone over text and image, of a layer in which text differs.

        Args:
            tensors: query of the image, (batch, image, heads, head_dim), key and value of text and
                image, (batch, text + image, heads, head_dim) each, without references.
            layout, valid_text, window: of the forward under way.

        Returns:
            (batch, image, heads * head_dim).
        """
        query, key, value = tensors
        text = layout.text_length
        if torch.is_grad_enabled():  # for queries of the image alone there is no backward pass
            query = functional.pad(query, (0, 0, 0, 0, text, 0))
            out = self._local((query, key, value), layout, valid_text, window)[:, text:]
            return out.flatten(2, 3).to(query.dtype)
        if valid_text is not None:
            rows = []
            for row, places in enumerate(valid_text):
                keys = (
                    torch.cat([x[row : row + 1, places], x[row : row + 1, text:]], dim=1)
                    for x in (key, value)
                )
                rows.append(
                    self._attend_image(
                        (query[row : row + 1], *keys), layout._replace(text_length=len(places))
                    )
                )
            return torch.cat(rows)
        window = self.tracker.window(layout) if window is None else window
        out = self._local(tensors, layout, None, window.image_queries)
        return out.flatten(2, 3).to(query.dtype)


def _causal(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segment: tuple[int, int, bool],
    key_valid: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of a part of the prefix, (batch, its tokens, channels)."""
    start, end, is_text = segment
    mask = None
    if is_text:
        mask = torch.ones(end - start, end, dtype=torch.bool, device=query.device).tril(start)
    if key_valid is not None:
        valid = key_valid[:, None, None, :end]
        mask = valid if mask is None else mask & valid
    q, k, v = (x.transpose(1, 2) for x in (query[:, start:end], key[:, :end], value[:, :end]))
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2, 3)


def _read(model: Any, given: Mapping[str, Any], grid: tuple[int, int] | None) -> Reading | None:
    """`Family.read`: img_shapes is [[...references, (frames, rows, columns)], ...batch]."""
    latents, slots = given.get("hidden_states"), given.get("img_mask")
    shapes = given.get("img_shapes")
    if latents is None or slots is None or not shapes:
        return None
    if any(other != shapes[0] for other in shapes):
        raise ValueError(
            f"CLEAR: all images of a batch must have one size, got img_shapes={shapes}."
        )
    *references, (frames, rows, columns) = shapes[0]
    if frames != 1:
        raise ValueError(f"CLEAR: Qwen-Image 2.1's images have one frame, got {frames}.")
    of_references, tokens = sum(math.prod(each) for each in references), latents.shape[1]
    if tokens != of_references + rows * columns or tokens % SLOT:
        raise ValueError(
            f"CLEAR: img_shapes={shapes} means {of_references + rows * columns} tokens of images, "
            f"a multiple of {SLOT}, but hidden_states has {tokens}."
        )
    text_length = slots.shape[1] - tokens // SLOT
    _check_positions(model, rows, columns, text_length + sum(max(h, w) for _, h, w in references))
    layout = Layout(text_length + of_references, rows, columns)
    mask = given.get("encoder_hidden_states_mask")
    if mask is not None:
        # Positions in the prefix, each of which an image's slot has four of.
        slots = slots[0, : mask.shape[1]]
        mask = (mask.bool() | slots).repeat_interleave(torch.where(slots, SLOT, 1), dim=1)
    return Reading(layout, latents, mask)


def _check_positions(model: Any, rows: int, columns: int, before: int) -> None:
    """The model's table of positions is finite, and past one of its ends comes the other."""
    if isinstance(model.pos_embed, ExtendedQwenImage21Rope):
        return
    half = max(rows - rows // 2, columns - columns // 2)
    if half > NEGATIVE or before >= POSITIONS:
        raise ValueError(
            f"CLEAR: Qwen-Image 2.1 has positions for {2 * NEGATIVE} tokens a side and "
            f"{POSITIONS - 1} of text and references before the image, got {rows} x {columns} and "
            f"{before}; make a smaller image, or shorten the prompt."
        )


class _Denoiser(Denoiser):
    """The prefix is in the output, too."""

    def velocity(self, output: Any, shape: Sequence[int]) -> torch.Tensor:
        velocity: torch.Tensor = output[:, -shape[0] :]
        return velocity


FAMILY = Family(
    name="qwen-image-2.1",
    title="Qwen-Image 2.1",
    recipe=Recipe(
        pipelines=("QwenImage21Pipeline",),
        defaults=Defaults(size=1024, radius=16, steps=40, guidance=1.0),
        latents=Latents(pack=1),
        patch=1,
        step=2,
        reduction=16,
        guidance=Guidance("true_cfg_scale", negative=" "),
        denoiser=_Denoiser(kept=("kv_cache", "kv_cache_mode")),
    ),
    transformer="QwenImage21Transformer2DModel",
    stacks=("transformer_blocks",),
    processors={
        "QwenImage21AttnProcessor": QwenImage21Processor,
        "QwenImage21FlexAttnProcessor": QwenImage21Processor,
    },
    read=_read,
    references="within the prompt, where each sees itself and what stands before it",
    order="text and references, image",
    grid_from="img_shapes",
    heads="32 x 128",
    positions="2048 tokens a side: a table; extended, no limit: computed",
    extend=extend,
    cut=None,
)
