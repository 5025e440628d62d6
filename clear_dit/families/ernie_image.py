"""ERNIE-Image: one stream, image first, a table of angles for every sample of a batch.

The image's first position is the length of its prompt. Angles are of neighbouring channels, but a
channel is rotated with the one half a head away. Its pipeline adds 1e-5 to the variance of latents,
where CLEAR adds what the autoencoder's configuration has as batch_norm_eps: 1e-4 where it is left
out, by which latents of variance 1 come out 0.005% larger.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..attention.axes import angles_along, of_tokens
from ..attention.layout import Layout
from ..attention.norm_rope import Rotary
from ..attention.positions import ExtendedPosEmbed, Extension
from ..attention.text_padding import used_length
from ..compat import names_from
from .family import BEGINS, ENDS, MODULATES, Cut, Family, Reading, own_positions
from .joint import JointProcessor, Stream, Turn
from .recipe import Defaults, Denoiser, Latents, Recipe

ErnieImageEmbedND3: Any
(ErnieImageEmbedND3,) = names_from(
    "diffusers.models.transformers.transformer_ernie_image", "ErnieImageEmbedND3"
)


class ErnieProcessor(JointProcessor):
    """In the place of `ErnieImageSingleStreamAttnProcessor`."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        freqs_cis: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(batch, image + text, channels); arguments are the stock processor's.

        The mask of shorter prompts is known already: it follows from the forward's arguments.
        """
        self._refuse_foreign_settings(None)
        assert freqs_cis is not None
        linears = attn.to_q, attn.to_k, attn.to_v
        stream = Stream(linears, (attn.norm_q, attn.norm_k), attn.head_dim)
        out, _ = self.attend(attn, hidden_states, stream, rotary=(freqs_cis,), key=freqs_cis)
        return attn.to_out[0](out)

    def tables(self, rotary: Rotary, turn: Turn) -> Rotary:
        """Angles, (batch, sequence, head_dim)."""
        (angles,) = rotary
        return (turn.whole.to_local(angles).squeeze(2),)

    def place(
        self,
        tokens: torch.Tensor,
        norm: Any,
        table: Rotary | None,
        text: torch.Tensor | None = None,
        text_norm: Any = None,
    ) -> torch.Tensor:
        """Query or key of one stream, rotated in its own dtype."""
        assert table is not None
        tokens, angles = norm(tokens), table[0].unsqueeze(-2)
        first, second = tokens.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        return tokens * angles.cos().to(tokens.dtype) + turned * angles.sin().to(tokens.dtype)


def _read(model: Any, given: Mapping[str, Any], grid: tuple[int, int] | None) -> Reading | None:
    latents, text, lengths = (given.get(x) for x in ("hidden_states", "text_bth", "text_lens"))
    if latents is None or text is None:
        return None
    rows, columns = (size // model.config.patch_size for size in latents.shape[-2:])
    layout = Layout(text.shape[1], rows, columns, image_first=True)
    if lengths is None:
        return Reading(layout, latents)
    mask = torch.arange(text.shape[1], device=lengths.device) < lengths[:, None]
    length = min(used_length(mask), text.shape[1])
    layout = layout._replace(text_length=length)
    return Reading(layout, latents, mask[:, :length], {"text_bth": text[:, :length]})


class ExtendedErnieEmbed(ExtendedPosEmbed):
    """Stands in for `ErnieImageEmbedND3`; bit for bit the same with factors of 1."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Angles, (batch, image + text, 1, k * sum(axes_dim)); k is 1, and more with "two".

        Args:
            ids: (batch, image + text, 3). The image's tokens share the first number; text has it
                only where it is padding, and is elsewhere at row 0 and column 0.
        """
        of_image = ids[..., :1] == ids[:, :1, :1]
        tables = [
            torch.cat(angles_along(self.axes, positions.unbind(dim=1), torch.float32), dim=1)
            for positions in of_tokens(self.axes, ids.flatten(0, 1), of_image.flatten(0, 1))
        ]
        angles = torch.cat([table.repeat_interleave(2, dim=1) for table in tables], dim=1)
        return angles.unflatten(0, ids.shape[:2]).unsqueeze(2)


def _extend(model: Any, extension: Extension) -> dict[str, Any]:
    positions = own_positions(model, "pos_embed", ErnieImageEmbedND3, ExtendedErnieEmbed)
    return {"pos_embed": ExtendedErnieEmbed.of(positions, extension)}


FAMILY = Family(
    name="ernie-image",
    title="ERNIE-Image",
    recipe=Recipe(
        pipelines=("ErnieImagePipeline",),
        defaults=Defaults(size=1024, radius=16, steps=50, guidance=4.0),
        latents=Latents("rows"),
        factor_counts_packing=True,
        casts_latents=False,
        denoiser=Denoiser(scale=1000.0),
        shift=4.0,  # its own
        prompts=lambda pipe: None,
        rewriters=("_enhance_prompt_with_pe",),
    ),
    transformer="ErnieImageTransformer2DModel",
    stacks=("layers",),
    processors={"ErnieImageSingleStreamAttnProcessor": ErnieProcessor},
    read=_read,
    order="image, text",
    grid_from="the latents' shape",
    heads="32 x 128",
    positions="no limit: sine and cosine of any position",
    extend=_extend,
    cut=Cut(output_of="x_embedder", whole_after="final_linear", tokens_first=True),
    wide={
        "text_proj": BEGINS,
        "time_embedding.*": BEGINS,
        "adaLN_modulation.1": MODULATES,
        "final_norm.linear": ENDS,
        "final_linear": ENDS,
    },
)
