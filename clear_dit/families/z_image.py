"""Z-Image: single-stream blocks, image first, then the captions; complex rotary tables.

Image and caption are each padded to a multiple of 32 tokens with a token of their own, which
everybody sees, as a text token: padding behind the image is counted with the references, that
behind the caption with the text. Only where captions of a batch still differ in length is there
padding that nobody may see. The blocks of `noise_refiner` attend over the image alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..attention.axes import Axis, angles_along, of_tokens, table_dtype
from ..attention.layout import Layout
from ..attention.norm_rope import Rotary, norm_and_rotate
from ..attention.positions import Extension
from ..compat import names_from
from .family import BEGINS, ENDS, Cut, Family, Reading, own_positions
from .joint import JointProcessor, Stream, Turn
from .prompt_reading import PromptReading, user_message
from .recipe import Defaults, Denoiser, Guidance, Latents, Recipe

if TYPE_CHECKING:
    from diffusers.models.transformers.transformer_z_image import (
        SEQ_MULTI_OF as MULTIPLE,
    )
    from diffusers.models.transformers.transformer_z_image import (
        RopeEmbedder,
        ZSingleStreamAttnProcessor,
    )
else:
    MULTIPLE, RopeEmbedder, ZSingleStreamAttnProcessor = names_from(
        "diffusers.models.transformers.transformer_z_image",
        "SEQ_MULTI_OF",
        "RopeEmbedder",
        "ZSingleStreamAttnProcessor",
    )


class ZImageProcessor(JointProcessor):
    """In the place of `ZSingleStreamAttnProcessor`."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        freqs_cis: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(batch, image + captions, channels); arguments are the stock processor's.

        The mask of shorter captions is known already: it follows from the forward's arguments.
        """
        self._refuse_foreign_settings(None)
        assert freqs_cis is not None
        linears = attn.to_q, attn.to_k, attn.to_v
        stream = Stream(linears, (attn.norm_q, attn.norm_k), attn.inner_dim // attn.heads)
        out, _ = self.attend(attn, hidden_states, stream, rotary=(freqs_cis,), key=freqs_cis)
        out = attn.to_out[0](out)
        return attn.to_out[1](out) if len(attn.to_out) > 1 else out

    def tables(self, rotary: Rotary, turn: Turn) -> Rotary:
        """cos and sin of a complex table, (1 or batch, sequence, channels / 2)."""
        (table,) = rotary
        if turn.forward.valid_text is None:
            # The image's positions follow the caption's: one table where these have one length.
            table = table[:1]
        table = turn.whole.to_local(table)
        return table.real.repeat_interleave(2, dim=-1), table.imag.repeat_interleave(2, dim=-1)

    def place(
        self,
        tokens: torch.Tensor,
        norm: Any,
        table: Rotary | None,
        text: torch.Tensor | None = None,
        text_norm: Any = None,
    ) -> torch.Tensor:
        assert table is not None
        tables = list(zip(*table, strict=True))
        if len(tables) == 1:
            return norm_and_rotate(tokens, norm, tables[0])
        rows = zip(tokens.split(1), tables, strict=True)
        return torch.cat([norm_and_rotate(row, norm, own) for row, own in rows])


class TextProcessor(ZSingleStreamAttnProcessor):
    """The stock processor, over captions alone, by the true positions of a table of several."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        freqs_cis: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As the stock processor, of freqs_cis (batch, tokens, positions * head_dim / 2)."""
        assert freqs_cis is not None
        true = freqs_cis[..., : attn.inner_dim // attn.heads // 2]
        out: torch.Tensor = super().__call__(
            attn, hidden_states, encoder_hidden_states, attention_mask, true
        )
        return out


def _read(model: Any, given: Mapping[str, Any], grid: tuple[int, int] | None) -> Reading | None:
    latents, captions = given.get("x"), given.get("cap_feats")
    if not latents or not captions:
        return None
    if isinstance(latents[0], list):
        raise ValueError(
            "CLEAR: Z-Image-Omni is not supported: images it is given stand before the one it "
            "makes, with captions between them."
        )
    sizes = {tuple(latent.shape[1:]) for latent in latents}
    if len(sizes) > 1:
        raise ValueError(
            "CLEAR: all images of a batch must have one size, got latents of "
            f"{sorted(sizes)} (frames, height, width)."
        )
    frames, height, width = sizes.pop()
    if frames != given.get("f_patch_size", 1):
        raise ValueError(f"CLEAR: Z-Image's images have one frame, got {frames}.")
    patch = given.get("patch_size", 2)
    rows, columns = height // patch, width // patch
    lengths = [len(caption) + -len(caption) % MULTIPLE for caption in captions]
    text_length = max(lengths)
    _check_positions(model, rows, columns, text_length)
    padding = -(rows * columns) % MULTIPLE
    layout = Layout(text_length, rows, columns, padding, image_first=True)
    mask = None
    if min(lengths) < text_length:
        positions = torch.arange(text_length, device=latents[0].device)
        mask = positions < positions.new_tensor(lengths)[:, None]
    return Reading(layout, latents[0], mask)


class ExtendedRopeEmbedder(nn.Module):
    """Stands in for `RopeEmbedder`, without an end; bit for bit the same with factors of 1.

    With "two" the image's rows and columns begin at `MARGIN`. Captions keep their positions, row 0
    and column 0 and one after the other on the first axis, where the image follows them, and so
    does padding.

    Args:
        stock: what it stands in for.
        extension: how positions are extended.
    """

    def __init__(self, stock: Any, extension: Extension) -> None:
        super().__init__()
        self.theta: Any = stock.theta
        self.axes_dims: Any = stock.axes_dims
        self.axes: tuple[Axis, ...] = extension.axes(self.theta, self.axes_dims, rows=1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The table of some position ids.

        Args:
            ids: (tokens, 3): caption position, row and column; of images with padding, or of
                captions, as the model asks for them.

        Returns:
            (tokens, k * sum(axes_dims) / 2), complex64; k is 1, and more with "two".
        """
        dtype = table_dtype(ids.device)
        of_image = (ids[:, :1] > 0) & (ids[:, 1:] > 0).any()
        angles = torch.cat(
            [
                angles
                for positions in of_tokens(self.axes, ids.to(dtype), of_image)
                for angles in angles_along(self.axes, positions.unbind(dim=1), dtype)
            ],
            dim=1,
        ).float()
        return torch.polar(torch.ones_like(angles), angles)


def _extend(model: Any, extension: Extension) -> dict[str, Any]:
    positions = own_positions(model, "rope_embedder", RopeEmbedder, ExtendedRopeEmbedder)
    return {"rope_embedder": ExtendedRopeEmbedder(positions, extension)}


def _check_positions(model: Any, rows: int, columns: int, text_length: int) -> None:
    """The tables of positions are finite; what lies past their end is an error on a GPU."""
    if isinstance(model.rope_embedder, ExtendedRopeEmbedder):
        return
    text_limit, row_limit, column_limit = model.config.axes_lens
    if rows > row_limit or columns > column_limit:
        raise ValueError(
            f"CLEAR: this Z-Image model has positions for {row_limit} x {column_limit} tokens, got "
            f"{rows} x {columns}; make a smaller image, or extend the positions (rope)."
        )
    if text_length + 2 > text_limit:  # captions begin at 1, the image follows them
        raise ValueError(
            f"CLEAR: this Z-Image model has positions for {text_limit - 2} tokens of text, got "
            f"{text_length} with padding; shorten the prompt."
        )


class _Denoiser(Denoiser):
    """Images in a list, with a frame each; the time runs from noise to image."""

    def arguments(
        self, latents: torch.Tensor, levels: torch.Tensor, conditioning: Mapping[str, Any]
    ) -> dict[str, Any]:
        images = list(latents.unsqueeze(2))  # [channels, frame, height, width]
        return {**conditioning, self.latents: images, self.time: 1 - levels}

    def levels(self, time: torch.Tensor) -> torch.Tensor:
        return 1 - time

    def velocity(self, output: Any, shape: Sequence[int]) -> torch.Tensor:
        return -torch.stack(list(output)).squeeze(2)


FAMILY = Family(
    name="z-image",
    title="Z-Image",
    recipe=Recipe(
        pipelines=("ZImagePipeline",),
        defaults=Defaults(size=1024, radius=16, steps=50, guidance=5.0),
        latents=Latents("grid"),
        guidance=Guidance(off=0.0),
        denoiser=_Denoiser("x", "t"),
        prompts=lambda pipe: PromptReading(512, template=user_message),
    ),
    transformer="ZImageTransformer2DModel",
    stacks=("noise_refiner", "layers"),
    processors={"ZSingleStreamAttnProcessor": ZImageProcessor},
    read=_read,
    order="image, padding, captions",
    grid_from="the latents' shapes",
    heads="30 x 128",
    positions="512 tokens a side: tables, axes_lens; extended, no limit: computed",
    extend=_extend,
    kept={
        "context_refiner": "attends over text alone",
        "siglip_refiner": "attends over an encoder's image tokens alone",
    },
    text_processors={"ZSingleStreamAttnProcessor": TextProcessor},
    cut=Cut(
        ("controlnet_block_samples",),
        inputs={"noise_refiner.0": ("x",)},
        whole_after="all_final_layer",
        time=lambda given: -given["t"],
    ),
    wide={
        "all_x_embedder.*": BEGINS,
        "cap_embedder.*": BEGINS,
        "t_embedder.*": BEGINS,
        "noise_refiner.*": "refines what all other blocks begin with: a small part",
        "context_refiner.*": "refines what all other blocks begin with: a small part",
        "all_final_layer.*": ENDS,
    },
    modulation=("layers.*.adaLN_modulation.0",),
)
