"""Stable Diffusion 3 and 3.5: image first, no rotary embedding, a finite table of positions.

Some blocks of SD3.5-medium have a second attention, `attn2`, over the image alone. Every attention
layer may have an IP-adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..attention.layout import Layout
from ..attention.norm_rope import norm_and_rotate
from ..attention.processor import CLEARProcessor
from ..attention.text_padding import Projected
from ..attention.tracker import WindowTracker
from ..compat import names_from
from .family import Family, Reading, adapter_was_unloaded, only
from .joint import JointProcessor
from .recipe import Defaults, Latents, Recipe, linear_shift
from .sd3_positions import ResampledPatchEmbed, extend

FusedJointAttnProcessor2_0, JointAttnProcessor2_0, SD3IPAdapterJointAttnProcessor2_0 = names_from(
    "diffusers.models.attention_processor",
    "FusedJointAttnProcessor2_0",
    "JointAttnProcessor2_0",
    "SD3IPAdapterJointAttnProcessor2_0",
)


class SD3Processor(JointProcessor):
    """In the place of `JointAttnProcessor2_0`, of `attn` and of `attn2`."""

    def stock(self) -> Any:
        return JointAttnProcessor2_0()

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Image and text, (batch, tokens, channels) each, or the image alone in `attn2`."""
        self._refuse_foreign_settings(attention_mask)
        image = self._image(attn, hidden_states)
        return self._attended(attn, image, encoder_hidden_states)

    def _image(self, attn: Any, hidden_states: torch.Tensor) -> Projected:
        """Query, key, value of the image, (batch, image, heads, head_dim) each."""
        return _by_head(attn, *(one(hidden_states) for one in (attn.to_q, attn.to_k, attn.to_v)))

    def _text(self, attn: Any, hidden_states: torch.Tensor) -> Projected:
        """The same of the text."""
        linears = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
        return _by_head(attn, *(one(hidden_states) for one in linears))

    def _attended(
        self,
        attn: Any,
        image: Projected,
        encoder_hidden_states: torch.Tensor | None,
        beside: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The layer's output.

        Args:
            image: from `_image`.
            beside: (batch, image, channels), added to what the image attends to.
        """
        query, key, value = image
        if encoder_hidden_states is None:
            query = norm_and_rotate(query, attn.norm_q, None)
            key = norm_and_rotate(key, attn.norm_k, None)
            image_out, _ = self.attend_streams((query, key, value))
            return _projected_out(attn, image_out, beside)
        text = self._text(attn, encoder_hidden_states)
        query = norm_and_rotate(query, attn.norm_q, None, text[0], attn.norm_added_q)
        key = norm_and_rotate(key, attn.norm_k, None, text[1], attn.norm_added_k)
        value = torch.cat([text[2], value], dim=1)
        del image, text
        layout, _, window = self.under_way()
        out = self.attend_joint((query, key, value), layout, None, window)
        del query, key, value
        text_out, image_out = out.tensor_split([layout.text_length], dim=1)
        if not attn.context_pre_only:  # the last block has no use for text any more
            text_out = attn.to_add_out(text_out)
        return _projected_out(attn, image_out, beside), text_out


class FusedSD3Processor(SD3Processor):
    """In the place of `FusedJointAttnProcessor2_0`.

    As there, the fused projections run: copies that diffusers makes beside the others, from which a
    LoRA that is loaded later is missing. The stock one leaves QK-norm out and fails in `attn2`;
    here both are as without fused projections.
    """

    def stock(self) -> Any:
        return FusedJointAttnProcessor2_0()

    def _image(self, attn: Any, hidden_states: torch.Tensor) -> Projected:
        return _by_head(attn, *attn.to_qkv(hidden_states).chunk(3, dim=-1))

    def _text(self, attn: Any, hidden_states: torch.Tensor) -> Projected:
        return _by_head(attn, *attn.to_added_qkv(hidden_states).chunk(3, dim=-1))


class _OfAdapters(SD3IPAdapterJointAttnProcessor2_0):  # type: ignore[valid-type, misc]
    """By this class diffusers knows an IP-adapter's processor; it has no weights of its own."""

    def __init__(self) -> None:
        nn.Module.__init__(self)


class SD3IPAdapterProcessor(SD3Processor, _OfAdapters):
    """In the place of `SD3IPAdapterJointAttnProcessor2_0`.

    Beside local attention the image attends, with norms of the IP-adapter's, to itself and to the
    image prompt. There it sees of itself what it sees in local attention, and the whole prompt.

    Args:
        settings, tracker: see `JointProcessor`.
        adapter: the stock processor: its weights and its scale are used as they are there.
    """

    def __init__(
        self,
        settings: CLEARProcessor | None = None,
        tracker: WindowTracker | None = None,
        adapter: Any = None,
    ) -> None:
        super().__init__(settings, tracker)
        self.adapter = adapter

    @classmethod
    def for_layer(
        cls, settings: CLEARProcessor, tracker: WindowTracker, old: Any
    ) -> SD3IPAdapterProcessor:
        """The processor that takes the place of `old`, whose IP-adapter it keeps."""
        return cls(settings, tracker, old.adapter if isinstance(old, cls) else old)

    def stock(self) -> Any:
        return self.adapter

    @property
    def scale(self) -> float:
        """Strength of the IP-adapter; `set_ip_adapter_scale` sets it."""
        return self.adapter.scale

    @scale.setter
    def scale(self, scale: float) -> None:
        self.adapter.scale = scale

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        ip_hidden_states: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """`SD3Processor.__call__` with an image prompt, or without one.

        Args:
            ip_hidden_states: the image prompt, (batch, tokens, channels).
            temb: the timestep's embedding for it, (batch, channels).
        """
        self._refuse_foreign_settings(attention_mask)
        image, beside = self._image(attn, hidden_states), None
        if ip_hidden_states is not None and self.scale != 0:
            beside = self.scale * self._prompted(attn, image, ip_hidden_states, temb)
        return self._attended(attn, image, encoder_hidden_states, beside)

    def _prompted(
        self, attn: Any, image: Projected, prompt: torch.Tensor, temb: torch.Tensor | None
    ) -> torch.Tensor:
        """What the image attends to by the adapter, (batch, image, channels)."""
        adapter = self.adapter
        prompt = adapter.norm_ip(prompt, temb=temb)
        key, value = _by_head(attn, adapter.to_k_ip(prompt), adapter.to_v_ip(prompt))
        # The prompt stands where text does. It asks for nothing: any query will do.
        tensors = (
            norm_and_rotate(image[0], adapter.norm_q, None, key, adapter.norm_ip_k),
            norm_and_rotate(image[1], adapter.norm_k, None, key, adapter.norm_ip_k),
            torch.cat([value, image[2]], dim=1),
        )
        length = key.shape[1]
        layout = self.under_way()[0]._replace(text_length=length)
        return self.attend_joint(tensors, layout)[:, length:]


def _by_head(attn: Any, *projected: torch.Tensor) -> Any:
    """(batch, tokens, heads, head_dim) each."""
    head_dim = attn.inner_dim // attn.heads
    return tuple(one.unflatten(-1, (-1, head_dim)) for one in projected)


def _projected_out(attn: Any, image: torch.Tensor, beside: torch.Tensor | None) -> torch.Tensor:
    return attn.to_out[1](attn.to_out[0](image if beside is None else image + beside))


def _read(model: Any, given: Mapping[str, Any], grid: tuple[int, int] | None) -> Reading | None:
    latents, text = given.get("hidden_states"), given.get("encoder_hidden_states")
    if latents is None or text is None:
        return None
    rows, columns = (size // model.config.patch_size for size in latents.shape[-2:])
    _check_positions(model, rows, columns)
    return Reading(Layout(text.shape[1], rows, columns, image_first=True), latents)


def _check_positions(model: Any, rows: int, columns: int) -> None:
    """The table of positions is finite."""
    positions, limit = model.pos_embed, model.config.pos_embed_max_size
    if limit is None:
        return
    resampled = isinstance(positions, ResampledPatchEmbed)
    row_limit, column_limit = positions.limits if resampled else (limit, limit)
    if rows > row_limit or columns > column_limit:
        raise ValueError(
            f"CLEAR: this SD3 model has positions for {row_limit} x {column_limit} tokens, got "
            f"{rows} x {columns}; make a smaller image, or extend the positions (rope "
            '"interpolation").'
        )


def _was_undone(model: Any, installed: CLEARProcessor) -> bool:
    # Fusing keeps the processors in a dict, which is empty when unfusing has set them again.
    emptied = getattr(model, "original_attn_processors", None) == {}
    unfused = isinstance(installed, FusedSD3Processor) and emptied
    return unfused or adapter_was_unloaded(model, "image_proj")


def _is_fused(attn: Any) -> bool:
    # diffusers keeps to_q, to_k and to_v beside fused ones, and says by another processor alone
    # which of them run.
    return isinstance(attn.processor, (FusedSD3Processor, FusedJointAttnProcessor2_0))


def _log_shift(pipe: Any, tokens: int, steps: int) -> float:
    """`Recipe.mu`: 1.16 at most where the scheduler does not say."""
    return linear_shift({"max_shift": 1.16} | dict(pipe.scheduler.config), tokens)


FAMILY = Family(
    name="sd3",
    title="Stable Diffusion 3, 3.5",
    recipe=Recipe(
        pipelines=("StableDiffusion3Pipeline",),
        defaults=Defaults(size=1024, radius=16, steps=28, guidance=7.0),
        latents=Latents(packed=False),
        mu=_log_shift,
    ),
    transformer="SD3Transformer2DModel",
    stacks=("transformer_blocks",),
    processors={
        "JointAttnProcessor2_0": SD3Processor,
        "FusedJointAttnProcessor2_0": FusedSD3Processor,
        "SD3IPAdapterJointAttnProcessor2_0": SD3IPAdapterProcessor,
    },
    was_undone=_was_undone,
    is_fused=_is_fused,
    read=_read,
    order="image, text",
    grid_from="the latents' shape",
    heads="38 x 64 (3.5-large), 24 x 64 (3.5-medium, 3-medium)",
    positions="192 tokens a side (3-medium, 3.5-large), 384 (3.5-medium): a table, pos_embed; so "
    'many times that as rope "interpolation" resamples it',
    extend=extend,
    methods=("none", "interpolation"),
    serves_fused=True,
    repeated_blocks=False,
    unsupported=only((), "not wired up so far"),
)
