"""Stable Diffusion 3 and 3.5: image first, no rotary embedding, a finite table of positions.

Some blocks of SD3.5-medium have a second attention, `attn2`, over the image alone. Every attention
layer may have an IP-adapter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..attention.layout import Layout
from ..attention.processor import CLEARProcessor
from ..attention.text_padding import Projected
from ..attention.tracker import WindowTracker
from ..compat import names_from
from .family import BEGINS, ENDS, Cut, Family, Reading, adapter_was_unloaded
from .joint import JointProcessor, Stream, Turn
from .prompt_reading import PromptReading
from .recipe import Defaults, Denoiser, Latents, Recipe, linear_shift
from .sd3_positions import ResampledPatchEmbed, extend

if TYPE_CHECKING:
    from diffusers.models.attention_processor import (
        FusedJointAttnProcessor2_0,
        JointAttnProcessor2_0,
        SD3IPAdapterJointAttnProcessor2_0,
    )
else:
    FusedJointAttnProcessor2_0, JointAttnProcessor2_0, SD3IPAdapterJointAttnProcessor2_0 = (
        names_from(
            "diffusers.models.attention_processor",
            "FusedJointAttnProcessor2_0",
            "JointAttnProcessor2_0",
            "SD3IPAdapterJointAttnProcessor2_0",
        )
    )


class SD3Processor(JointProcessor):
    """In the place of `JointAttnProcessor2_0`, of `attn` and of `attn2`."""

    rotary = False

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
        return self._attended(attn, hidden_states, encoder_hidden_states)

    def _stream(self, attn: Any) -> Stream:
        """How the image is projected."""
        linears = attn.to_q, attn.to_k, attn.to_v
        return Stream(linears, (attn.norm_q, attn.norm_k), _head_dim(attn))

    def _text_stream(self, attn: Any) -> Stream:
        """The same of the text, which an `attn2` has not."""
        linears = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
        return Stream(linears, (attn.norm_added_q, attn.norm_added_k), _head_dim(attn))

    def _attended(
        self,
        attn: Any,
        image: torch.Tensor,
        text: torch.Tensor | None,
        branch: Callable[[Turn, Projected, Any], torch.Tensor] | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The layer's output.

        Args:
            branch: of the layer's turn, the image's query, key and value, and the halo: (batch,
                image, channels), added to what the image attends to.
        """
        stream = self._stream(attn)
        turn = self.turn(image.shape[1], None if text is None else text.shape[1])
        halo = self.send(turn, attn, image)
        projected = stream.project(image)
        beside = None if branch is None else branch(turn, projected, halo)
        if text is None:
            out = self.attend_projected(turn, projected, stream, halo=halo)
            return _projected_out(attn, out, beside)
        text_stream = self._text_stream(attn)
        of_text = text_stream.project(text)
        out = self.attend_projected(turn, projected, stream, of_text, text_stream, halo=halo)
        del projected, of_text
        image_out, text_out = self.split(turn, out)
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

    def _stream(self, attn: Any) -> Stream:
        return super()._stream(attn)._replace(linears=(attn.to_qkv,))

    def _text_stream(self, attn: Any) -> Stream:
        return super()._text_stream(attn)._replace(linears=(attn.to_added_qkv,))


class _OfAdapters(SD3IPAdapterJointAttnProcessor2_0):
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
        branch = None
        if ip_hidden_states is not None and self.scale != 0:
            branch = functools.partial(self._prompted, attn, ip_hidden_states, temb)
        return self._attended(attn, hidden_states, encoder_hidden_states, branch)

    def _prompted(
        self,
        attn: Any,
        prompt: torch.Tensor,
        temb: torch.Tensor | None,
        turn: Turn,
        image: Projected,
        halo: Any,
    ) -> torch.Tensor:
        """What the image attends to by the adapter, (batch, image, channels)."""
        adapter = self.adapter
        stream = self._stream(attn)._replace(norms=(adapter.norm_q, adapter.norm_k))
        linears, norms = (adapter.to_k_ip, adapter.to_v_ip), (adapter.norm_ip_k, adapter.norm_ip_k)
        prompt = adapter.norm_ip(prompt, temb=temb)
        key, value = (one(prompt).unflatten(-1, (-1, stream.head_dim)) for one in linears)
        # The prompt stands where text does. It asks for nothing: any query will do.
        length = key.shape[1]
        turn = turn.with_text(length)
        of_prompt = stream._replace(norms=norms)
        out = self.attend_projected(turn, image, stream, (key, key, value), of_prompt, halo=halo)
        return self.scale * out[:, length:]


def _head_dim(attn: Any) -> int:
    return attn.inner_dim // attn.heads


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


def _prompts(pipe: Any) -> PromptReading:
    """`Recipe.prompts`: T5 reads furthest, and may be left out."""
    if pipe.config.get("text_encoder_3", (None, None))[1] is not None:
        return PromptReading(256, "tokenizer_3")
    return PromptReading(pipe.tokenizer.model_max_length)


FAMILY = Family(
    name="sd3",
    title="Stable Diffusion 3, 3.5",
    recipe=Recipe(
        pipelines=("StableDiffusion3Pipeline",),
        defaults=Defaults(size=1024, radius=16, steps=28, guidance=7.0),
        latents=Latents("grid"),
        denoiser=Denoiser(scale=1000.0),
        mu=_log_shift,
        prompts=_prompts,
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
    cut=Cut(("block_controlnet_hidden_states",), output_of="pos_embed"),
    wide={
        "time_text_embed.*": BEGINS,
        "context_embedder": BEGINS,
        "norm_out.linear": ENDS,
        "proj_out": ENDS,
    },
    modulation=(
        "transformer_blocks.*.norm1.linear",
        "transformer_blocks.*.norm1_context.linear",
    ),
)
