"""CogView4: one stream of text and image, rotary embedding of the image only.

Positions are whole numbers up to 255 a side, to which larger images are squeezed: past 256 tokens
neighbours would share a position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..attention.axes import MARGIN, Axis, along_axes, angles_along, over_grid
from ..attention.layout import Layout
from ..attention.norm_rope import Rotary
from ..attention.positions import Extension
from ..compat import names_from
from .family import BEGINS, ENDS, Cut, Family, Reading, own_positions
from .joint import JointProcessor, Stream, Turn, image_tables
from .recipe import Defaults, Denoiser, Latents, Recipe

apply_rotary_emb: Any
(apply_rotary_emb,) = names_from("diffusers.models.embeddings", "apply_rotary_emb")
CogView4RotaryPosEmbed: Any
(CogView4RotaryPosEmbed,) = names_from(
    "diffusers.models.transformers.transformer_cogview4", "CogView4RotaryPosEmbed"
)


class CogView4Processor(JointProcessor):
    """In the place of `CogView4AttnProcessor`."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Image and text, (batch, tokens, channels) each; arguments are the stock processor's."""
        self._refuse_foreign_settings(attention_mask)
        assert image_rotary_emb is not None
        # One set of projections and norms for both.
        linears = attn.to_q, attn.to_k, attn.to_v
        stream = Stream(linears, (attn.norm_q, attn.norm_k), attn.inner_dim // attn.heads)
        out, text_out = self.attend(
            attn,
            hidden_states,
            stream,
            encoder_hidden_states,
            stream,
            image_rotary_emb,
            image_rotary_emb[0],
        )
        out, text_out = (attn.to_out[1](attn.to_out[0](x)) for x in (out, text_out))
        return out, text_out

    def tables(self, rotary: Rotary, turn: Turn) -> Rotary:
        return image_tables(rotary, turn)

    def place(
        self,
        tokens: torch.Tensor,
        norm: Any,
        table: Rotary | None,
        text: torch.Tensor | None = None,
        text_norm: Any = None,
    ) -> torch.Tensor:
        tokens = norm(tokens)
        if text is not None:
            tokens = torch.cat([text_norm(text), tokens], dim=1)
        # Angles of the first half of the channels come again in the second.
        rotated: torch.Tensor = apply_rotary_emb(
            tokens, table, use_real_unbind_dim=-2, sequence_dim=1
        )
        return rotated


def _read(model: Any, given: Mapping[str, Any], grid: tuple[int, int] | None) -> Reading | None:
    latents, text = given.get("hidden_states"), given.get("encoder_hidden_states")
    if latents is None or text is None:
        return None
    config = model.config
    rows, columns = (size // config.patch_size for size in latents.shape[-2:])
    row_limit, column_limit = config.rope_axes_dim
    extended = isinstance(model.rope, ExtendedCogView4RotaryPosEmbed)
    if not extended and (rows > row_limit or columns > column_limit):
        raise ValueError(
            f"CLEAR: this CogView4 model has {row_limit} x {column_limit} positions, which the "
            f"neighbours among {rows} x {columns} tokens would have to share; make a smaller "
            "image, or extend the positions (rope)."
        )
    layout = Layout(text.shape[1], rows, columns)
    mask = given.get("attention_mask")
    if mask is None:
        return Reading(layout, latents)
    if tuple(mask.shape) != tuple(text.shape[:2]):
        return None  # the model itself complains
    # The stock processor adds such a mask to the scores as numbers, which hides nothing.
    return Reading(layout, latents, mask.bool(), {"attention_mask": None})


def _log_shift(pipe: Any, tokens: int, steps: int) -> float:
    """`Recipe.mu`: the shift itself, its scheduler being "linear"."""
    module = "diffusers.pipelines.cogview4.pipeline_cogview4"
    (calculate_shift,) = names_from(module, "calculate_shift")
    config = pipe.scheduler.config
    return float(
        calculate_shift(
            tokens,
            config.get("base_image_seq_len", 256),
            config.get("base_shift", 0.25),
            config.get("max_shift", 0.75),
        )
    )


class ExtendedCogView4RotaryPosEmbed(nn.Module):
    """Stands in for `CogView4RotaryPosEmbed`; bit for bit the same with factors of 1.

    The stock table is interpolated already: an image of any size and shape fills positions 0 to
    256, rounded down. Extended ones are not rounded, so that no two tokens share any; and distances
    between tokens are true where they are those of an image of the trained extent: 4 from token to
    token where that is 64. With "interpolation" the image fills the trained positions, with "yarn"
    slow frequencies do as in that, and fast ones see true distances, as with "two" all do in the
    first table. In its others the image keeps a `MARGIN` at both ends. Text is not rotated, which
    is position 0 either way.

    Args:
        stock: what it stands in for.
        extension: how positions are extended.
    """

    def __init__(self, stock: Any, extension: Extension) -> None:
        super().__init__()
        self.dim: Any = stock.dim
        self.theta: Any = stock.theta
        self.patch_size: Any = stock.patch_size
        self.rope_axes_dim: Any = stock.rope_axes_dim
        self.axes: tuple[Axis, ...] = extension.axes(
            self.theta, (self.dim // 2, self.dim // 2), rows=0
        )

    def forward(self, hidden_states: torch.Tensor) -> Rotary:
        """The table of an image.

        Args:
            hidden_states: latents, (batch, channels, height, width).

        Returns:
            cos and sin, (image, k * dim) each, float32; k is 1, and more with "two".
        """
        sizes = [size // self.patch_size for size in hidden_states.shape[-2:]]
        along = zip(self.axes, sizes, self.rope_axes_dim, strict=True)
        axes, positions = zip(*(_placed(*one) for one in along), strict=True)
        cos, sin = list[torch.Tensor](), list[torch.Tensor]()
        for each in along_axes(axes, positions):
            angles = angles_along(axes, each, torch.float32)
            for table, function in ((cos, torch.cos), (sin, torch.sin)):
                # By way of the CPU, where the stock one is made.
                values = over_grid([function(one).to(hidden_states.device) for one in angles])
                table += [values, values]  # the halves of a head's channels
        return torch.cat(cos, dim=1), torch.cat(sin, dim=1)


def _placed(axis: Axis, tokens: int, limit: int) -> tuple[Axis, torch.Tensor]:
    """An axis in the model's positions, and those of an image's tokens on it."""
    places = torch.arange(tokens, device="cpu")
    if axis.factor == 1:
        step = limit / tokens
        return axis, places * step if tokens > limit else (places * limit // tokens).float()
    trained = tokens / axis.factor
    if axis.method == "two":
        trained = (tokens - 1) / axis.factor + 1 + 2 * MARGIN
    step = limit / trained
    return replace(axis, margin=MARGIN * step, trained_side=limit), places * step


def _extend(model: Any, extension: Extension) -> dict[str, Any]:
    positions = own_positions(model, "rope", CogView4RotaryPosEmbed, ExtendedCogView4RotaryPosEmbed)
    return {"rope": ExtendedCogView4RotaryPosEmbed(positions, extension)}


FAMILY = Family(
    name="cogview4",
    title="CogView4",
    recipe=Recipe(
        pipelines=("CogView4Pipeline",),
        defaults=Defaults(size=1024, radius=16, steps=50, guidance=5.0),
        latents=Latents("grid"),
        denoiser=Denoiser(scale=1000.0),
        mu=_log_shift,
        shift=3.25,  # its own at 1024 x 1024 px
        text_length=1024,
    ),
    transformer="CogView4Transformer2DModel",
    stacks=("transformer_blocks",),
    processors={"CogView4AttnProcessor": CogView4Processor},
    read=_read,
    order="text, image",
    grid_from="the latents' shape",
    heads="32 x 128",
    positions="256 tokens a side: beyond, neighbours share positions; extended, no limit: none do",
    extend=_extend,
    # The factor of "ntk" is no extent, and these positions have none of their own.
    methods=("none", "yarn", "interpolation", "two"),
    repeated_blocks=False,
    cut=Cut(output_of="patch_embed"),
    wide={
        "patch_embed.*": BEGINS,
        "time_condition_embed.*": BEGINS,
        "norm_out.linear": ENDS,
        "proj_out": ENDS,
    },
    modulation=("transformer_blocks.*.norm1.linear",),
)
