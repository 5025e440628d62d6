"""Qwen-Image 2.1: one stream, in which the image to be made is last and alone sees everything.

What stands before it, its prefix, is text in which reference images are embedded. A token of text
sees what came before it, a reference image that and itself, and none of them sees the image: the
prefix stays as it is, of any step, and its keys and values may be kept for the next ones. Here the
image's queries alone are local: they see the prefix and their disc.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from ..attention.layout import Layout
from ..attention.norm_rope import Rotary
from ..attention.processor import Shared, Tables
from ..attention.text_padding import Projected, Row
from ..compat import names_from
from ..kernels.two_positions import Rotated, Scaled
from .family import BEGINS, ENDS, MODULATES, Cut, Family, Reading
from .joint import JointProcessor, Stream, Turn
from .qwen21_positions import ExtendedQwenImage21Rope, extend
from .recipe import Defaults, Denoiser, Guidance, Latents, Recipe

SLOT, _rotate = names_from(
    "diffusers.models.transformers.transformer_qwenimage21",
    "_IMG_TOKENS_PER_SLOT",
    "apply_rotary_emb_qwen",
)
# Positions of the model's table, and those of them that are negative.
POSITIONS, NEGATIVE = 8192, 1024
# (first token, token after the last, whether it is text) of the parts of a prefix.
Segments = list[tuple[int, int, bool]]


class QwenImage21Processor(JointProcessor):
    """In the place of `QwenImage21AttnProcessor` and of `QwenImage21FlexAttnProcessor`.

    The prefix has the same position by every table: its keys in the cache, rotated by the true
    ones, are those that the image's queries see by scaled ones too.
    """

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
        assert rotary_emb is not None
        # Under tensor parallelism a rank has fewer heads than the layer says.
        stream = Stream(
            (attn.to_q, attn.to_k, attn.to_v),
            (attn.norm_q, attn.norm_k),
            attn.inner_dim // attn.heads,
        )
        turn = self.turn(hidden_states.shape[1], key=rotary_emb)
        kept, first = None, turn.layout.text_length
        if kv_cache_mode == "cached":
            kept, turn = layer_cache.get(), turn.behind_text
        halo = self.send(turn, attn, hidden_states)
        make = functools.partial(self._by_position, (rotary_emb,), turn, stream.head_dim)
        near, further, of_halo = Tables.of(rotary_emb, make, turn.forward.share)
        assert near is not None
        query, key, value = stream.project(hidden_states)
        prefix_query, query = query.tensor_split([first], dim=1)
        # For queries of the image alone there is no backward pass.
        empty = turn.layout.text_length if torch.is_grad_enabled() else 0

        def rotated(table: Rotary) -> Rotated:
            """Query of the image, key of prefix and image."""
            placed = self.place(query, attn.norm_q, (table[0][first:],))
            keys = self.place(key, attn.norm_k, table)
            keys = keys if kept is None else torch.cat([kept[0], keys], dim=1)
            return functional.pad(placed, (0, 0, 0, 0, empty, 0)), keys

        image_query, whole_key = rotated(near)
        whole_value = value if kept is None else torch.cat([kept[1], value], dim=1)
        if kv_cache_mode == "extract":
            layer_cache.store(*(x[:, cache_write_slice].clone() for x in (whole_key, value)))
        parts = []
        if segments:
            prefix_query = self.place(prefix_query, attn.norm_q, (near[0][:first],))
            tensors = prefix_query, whole_key, value
            parts = [_causal(*tensors, part, key_valid) for part in segments]
        shared = None
        if halo is not None:
            arrived = functools.partial(self._arrived, stream, halo, of_halo)
            shared = Shared.of(turn.forward.share, arrived)
        tensors = image_query, whole_key, whole_value
        out = self._attend_image(tensors, turn, self._scaled(rotated, further), shared)
        parts.append(out[:, empty:].flatten(2, 3))
        joined = torch.cat(parts, dim=1).to(query.dtype)
        return attn.to_out[1](attn.to_out[0](joined))

    def place(
        self,
        tokens: torch.Tensor,
        norm: Any,
        table: Rotary | None,
        text: torch.Tensor | None = None,
        text_norm: Any = None,
    ) -> torch.Tensor:
        assert table is not None
        rotated: torch.Tensor = _rotate(norm(tokens).to(tokens.dtype), table[0], use_real=False)
        return rotated

    def _attend_image(
        self, tensors: Projected, turn: Turn, scaled: Scaled | None, shared: Shared | None
    ) -> torch.Tensor:
        """Local attention of the image over prefix and image.

        Args:
            tensors: query, of the image alone but where gradients are enabled, and key and value.
            scaled: query and key again, see `CLEARProcessor._local`; shared: likewise.

        Returns:
            Shape of the query.
        """
        layout, window, interval = turn.layout, turn.window, turn.forward.interval
        if torch.is_grad_enabled():
            valid = turn.valid_text
            return self._local(tensors, layout, valid, window, scaled, shared, interval)
        if turn.valid_text is not None:
            rows = []
            for number, places in enumerate(turn.valid_text):
                row = Row(number, places, layout.text_length)
                own = functools.partial(_of_row, row)
                query, key = own(tensors[:2])
                (value,) = row.tokens(tensors[2])
                rows.append(
                    self._attend_image(
                        (query, key, value),
                        turn.with_text(len(places)),
                        None if scaled is None else scaled.after(own),
                        None if shared is None else shared.of_row(row),
                    )
                )
            return torch.cat(rows)
        if window is None:
            window = self.tracker.window(layout, self.layer_radii[interval])
        return self._local(tensors, layout, None, window.image_queries, scaled, shared)


def _of_row(row: Row, rotated: Rotated) -> Rotated:
    """Query of the image, and key of prefix and image without padding, of one sample."""
    query, key = rotated
    return row.sample(query), *row.tokens(key)


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
        prompts=lambda pipe: None,
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
    cut=Cut(
        inputs={"transformer_blocks.0": ("hidden_states",), "norm_out": ("target_token_mask",)},
        of_blocks=("target_token_mask",),
        image_last=True,
    ),
    wide={
        "time_text_embed.*": BEGINS,
        "img_in": BEGINS,
        "txt_in.*": BEGINS,
        "modulation.1": MODULATES,
        "norm_out.linear": ENDS,
        "proj_out": ENDS,
    },
)
