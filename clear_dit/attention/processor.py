"""CLEARProcessor: CLEAR's local attention inside diffusers' FLUX attention layers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from ..compat import names_from
from ..kernels.attention import local_attention
from ..kernels.cells import FAR_LEVELS
from ..kernels.choice import IMPLS, why_not
from ..kernels.numbers import integer
from ..kernels.two_positions import (
    Rotated,
    Scaled,
    full_two_position_attention,
    two_position_attention,
)
from ..kernels.window import POOLED_WEIGHTS, Window
from .layout import Layout
from .norm_rope import Rotary, norm_and_rotate
from .radii import ByLevel, Radii, take_radii
from .text_padding import Projected, Row, ValidText, attend_without_padding
from .tracker import Forward, LayerRadii, WindowTracker

FluxAttention: Any
FluxAttnProcessor: Any
_get_qkv_projections, FluxAttention, FluxAttnProcessor = names_from(
    "diffusers.models.transformers.transformer_flux",
    "_get_qkv_projections",
    "FluxAttention",
    "FluxAttnProcessor",
)

# Arguments of a processor's constructor.
SETTINGS = (
    "radius",
    "down_factor",
    "impl",
    "grid",
    "proportional_base",
    "references",
    "far",
    "pooled_weight",
)
# Parameters of a processor: what is learned of pooled keys.
LEARNED = ("spatial_weight", "far_weight", "far_offset")
# How reference images attend within themselves.
REFERENCES = ("dense", "local")


class Shared(NamedTuple):
    """An image that ranks share, in one layer.

    Attributes:
        image: a `pipelines.parallel.SharedImage`.
        arrived: key and value of the neighbours' rows, (batch, tokens, heads, head_dim) each; waits
            for them.
    """

    image: Any
    arrived: Callable[[], Rotated]

    @classmethod
    def of(cls, image: Any, arrived: Callable[[], Rotated]) -> Shared:
        """Arguments are the attributes; what arrives is made once, as attention takes it."""
        return cls(image, functools.cache(lambda: _pair(_autocast(arrived()))))

    def of_row(self, row: Row) -> Shared:
        """The same of one sample of the batch."""
        return Shared(self.image, lambda: _pair(row.sample(x) for x in self.arrived()))


class Tables(NamedTuple):
    """A rotary table of a layer's tokens, position by position.

    Attributes:
        near: by true positions; None where tokens are not rotated.
        further: by scaled ones, the least scaled first, where tokens have several.
        halo: of the neighbours' rows by true positions, where ranks share the image.
    """

    near: Rotary | None = None
    further: Sequence[Rotary] = ()
    halo: Rotary | None = None

    @classmethod
    def of(cls, key: torch.Tensor, make: Callable[[], list[Rotary]], share: Any) -> Tables:
        """Those of this rank's tokens.

        Args:
            key, make: see `SharedImage.tables`.
            share: a `pipelines.parallel.SharedImage`, if any.
        """
        (near, *further), halo = (make(), None) if share is None else share.tables(key, make)
        return cls(near, further, halo)


class CLEARProcessor(nn.Module):
    """Attention processor for the double and single blocks of FLUX.1 (arXiv 2412.16112).

    `transformer.set_attn_processor(CLEARProcessor())` is all it takes: the token grid and the text
    length are found from the rotary table of each forward, at any resolution and aspect ratio.
    `apply_clear` gives every layer a processor of its own, which `down_factor` > 1 needs (a layer
    has its own weights), and torch.compile and IP-adapters too.

    With far keys an image token sees the whole image, near tokens one by one and far ones pooled
    into ever coarser cells (see `kernels/cells.py`), which needs no tuned weights.

    Tokens of reference images (FLUX.1-Kontext) are seen by every query and see everything, as text;
    with references="local" they see of their own image only the disc. Only the image has far keys.

    Args:
        radius: of the disc an image token attends to, in tokens (16 pixels for FLUX), at least 1;
            or a map of layers' names ("transformer_blocks.0.attn") to such, with "*" for those it
            does not name. A map, `dense_layers` and `dense_until` are for `apply_clear` and
            `CLEARPipeline.set_attn_processor`, which know layers' names and noise levels.
        down_factor: side of a pooling cell, in tokens; 1 is the variant without pooled keys.
        impl: one of `auto, triton, flex, tiled, reference`; see `local_attention`. Layers that
            attend to everything run PyTorch's own attention.
        grid: (rows, columns) of the image, in tokens; it is found where None.
        proportional_base: number of tokens (text + image) the model was trained at, 4608 for FLUX
            at 1024 px. Scores are then scaled by sqrt(log_base(tokens) / head_dim), which keeps
            their entropy at higher resolutions (arXiv 2306.08645); by head_dim^-0.5 where None.
        references: "dense", or "local": a token of a reference image attends within its own image
            to the disc of `radius` tokens alone, on that image's grid, which takes time linear in
            its tokens. To all else it attends in full, as in "dense", and there are no pooled nor
            far keys of it. For inference; not with two positions a token, nor shared by several
            ranks.
        far: True takes far keys, as many levels as the grid needs; False is the paper's CLEAR. None
            does as the CLEAR weights that are loaded were made for; without any it takes far keys,
            and says so once. With `down_factor` > 1 or radius 1 there are none.
        pooled_weight: of a pooled key of `down_factor`: "one", as published, or "count": the log of
            the tokens it stands for is added to its score.
        dense_layers: names of layers in which every token attends to every one.
        dense_until: noise level, from 1 (noise) to 0 (the image), down to which all layers do.

    Attributes:
        radii: of all layers.
        spatial_weight: (1, 1, 1, f, 1, f, 1), the pooling weights; None if f = down_factor is 1.
        far_weight: (levels, 2, 2), the weights that far keys are pooled with, by the child's place;
            None where nothing is learned of far keys, which is 1 / 4 each.
        far_offset: (levels, heads), added to the scores of far keys; None likewise.

    Raises:
        ValueError: a setting out of its range, settings that exclude each other, an unknown `impl`,
            or "triton" where it cannot run.
    """

    # Whether image tokens attend to their disc alone (see `FullTwoPositions`).
    local = True
    # Whether the layers get a rotary table, in which a token may have several positions.
    rotary = True
    spatial_weight: nn.Parameter | None
    far_weight: nn.Parameter | None
    far_offset: nn.Parameter | None
    # diffusers sets these on any processor; see `_refuse_foreign_settings`.
    _attention_backend = None
    _parallel_config = None

    def __init__(
        self,
        radius: int | Mapping[str, int] | Radii = 16,
        down_factor: int = 1,
        impl: str = "auto",
        grid: tuple[int, int] | None = None,
        proportional_base: int | None = None,
        references: str = "dense",
        far: bool | None = None,
        pooled_weight: str = "one",
        dense_layers: Sequence[str] = (),
        dense_until: float | None = None,
    ) -> None:
        super().__init__()
        radii = take_radii("CLEARProcessor", radius, dense_layers, dense_until)
        down_factor = integer("CLEARProcessor: down_factor", down_factor, 1)
        if impl not in IMPLS:
            raise ValueError(
                f"CLEARProcessor: impl must be one of {', '.join(IMPLS)}; got {impl!r}."
            )
        if impl == "triton" and not torch.cuda.is_available():
            reason = why_not(impl, torch.empty(1, 1, 1, 64))
            if reason is not None:
                raise ValueError(
                    f"CLEARProcessor: impl='triton' cannot run on this machine: it {reason}. "
                    "Use impl='auto' or another one."
                )
        if grid is not None:
            if not isinstance(grid, (tuple, list)) or len(grid) != 2:
                raise ValueError(
                    f"CLEARProcessor: grid must be (rows, columns) in tokens, got {grid!r}."
                )
            rows, columns = grid
            grid = (
                integer("CLEARProcessor: grid rows", rows, 1),
                integer("CLEARProcessor: grid columns", columns, 1),
            )
        if proportional_base is not None:
            proportional_base = integer("CLEARProcessor: proportional_base", proportional_base, 2)
        if references not in REFERENCES:
            raise ValueError(
                f"CLEARProcessor: references must be {' or '.join(REFERENCES)}, got {references!r}."
            )
        if grid is not None and references == "local":
            raise ValueError(
                "CLEARProcessor: references='local' needs the grids of the reference images, which "
                "are found with the image's; leave grid out."
            )
        _check_far(far, pooled_weight, min(radii.all), down_factor)
        self.radii = radii
        self.layer_radii = radii.of_layer("") if radii.is_plain else ()
        self.down_factor = down_factor
        self.impl = impl
        self.grid = grid
        self.proportional_base = proportional_base
        self.references = references
        self.far = far
        self.pooled_weight = pooled_weight
        self.tracker: WindowTracker = self.new_tracker()
        self.register_parameter("far_weight", None)
        self.register_parameter("far_offset", None)
        if down_factor > 1:
            shape = (1, 1, 1, down_factor, 1, down_factor, 1)
            self.spatial_weight = _parameter(shape, down_factor**-2)
        else:
            self.register_parameter("spatial_weight", None)

    @property
    def settings(self) -> dict[str, Any]:
        """The constructor's arguments."""
        radius = self.radius if self.radii.is_plain else self.radii
        return {name: getattr(self, name) for name in SETTINGS} | {"radius": radius}

    @property
    def radius(self) -> int:
        """Of layers of which nothing else is said, in tokens."""
        return self.radii.base

    @property
    def layer_radii(self) -> ByLevel:
        """Of the layer the processor is in, one for each interval of noise levels."""
        return self.of_layer.radii

    @layer_radii.setter
    def layer_radii(self, radii: ByLevel) -> None:
        self.of_layer: LayerRadii = LayerRadii(radii)

    @property
    def has_far_keys(self) -> bool:
        """Whether image tokens have far keys: what `far` means with the weights that are loaded."""
        return self.tracker.far_levels > 0

    def extra_repr(self) -> str:
        radius = self.radii.of_one(self.layer_radii) if self.layer_radii else str(self.radii)
        shown = self.settings | {"radius": radius, "far": self.has_far_keys}
        return ", ".join(
            f"{name}={value if name == 'radius' else repr(value)}" for name, value in shown.items()
        )

    def new_tracker(self, weights_far: bool | None = None) -> WindowTracker:
        """A tracker of windows with these settings; for the argument see `decide_far`."""
        tracker = WindowTracker(self.radii, self.down_factor, pooled_weight=self.pooled_weight)
        tracker.take_far(*self._far_levels(weights_far))
        return tracker

    def decide_far(self, weights_far: bool | None) -> None:
        """Take far keys or not, from now on.

        Args:
            weights_far: whether the CLEAR weights that are loaded were made for far keys; None
                where none are.
        """
        self.tracker.take_far(*self._far_levels(weights_far))

    def _far_levels(self, weights_far: bool | None) -> tuple[int, bool]:
        """How many there are, and whether by default alone."""
        if self.far is not None:
            return (FAR_LEVELS if self.far else 0), False
        far = weights_far is not False and self.down_factor == 1 and min(self.radii.all) > 1
        return (FAR_LEVELS if far else 0), far and weights_far is None

    def add_far_parameters(self, heads: int) -> None:
        """Let something be learned of far keys: nothing yet, 1 / 4 each and no offset.

        Args:
            heads: of the layer.
        """
        self.far_weight = _parameter((FAR_LEVELS, 2, 2), 1 / 4)
        self.far_offset = _parameter((FAR_LEVELS, heads), 0.0)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> CLEARProcessor:
        """As in any module, but what is learned stays as it is where weights are stored in 8 bits.

        They are computed in another dtype, and take nearly all of the memory.
        """

        def apply(tensor: torch.Tensor) -> torch.Tensor:
            new: torch.Tensor = fn(tensor)
            return new if new.element_size() > 1 else tensor.to(new.device)

        if recurse:
            for module in self.children():  # an IP-adapter
                module._apply(fn)
        return super()._apply(apply, recurse=False)

    def forward(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The weights of pooling, and the offset of far keys.

        Copies: offloading hooks take the parameters' values away again.
        """
        weight, offset = self.spatial_weight, None
        if self.far_weight is not None:
            assert self.far_offset is not None
            weight, offset = self.far_weight, self.far_offset.clone()
        return None if weight is None else weight.clone(), offset

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """What `FluxAttnProcessor` computes, with local attention.

        Args:
            attn: the layer; its own projections, norms and output are used.
            hidden_states: (batch, image, channels) in a double block, in a single block
                (batch, text + image, channels); image is the image and reference images.
            encoder_hidden_states: (batch, text, channels) in a double block, else None.
            attention_mask: must be None: the window is the mask.
            image_rotary_emb: (cos, sin), float32, (text + image, head_dim) each; or these of true
                and then of scaled positions, the least scaled first, see `two_position_attention`.

        Returns:
            (image, text) in a double block, text and image together in a single block.

        Raises:
            ValueError: a mask, settings meant for diffusers' own attention, or a grid that cannot
                be found or contradicts the sequence.
        """
        return self._attend(
            attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
        )

    def _attend(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        rotary: Rotary | None,
        branch: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> Any:
        """`__call__`; in a double block also with a branch beside local attention.

        Args:
            branch: of the image's queries, projected: (batch, image, heads, head_dim). What it
                returns, (batch, image, channels), comes third.
        """
        self._refuse_foreign_settings(attention_mask)
        if not isinstance(attn, FluxAttention):
            raise ValueError(
                "CLEARProcessor: set_attn_processor is for FLUX.1's layers, got a layer of class "
                f"{type(attn).__name__}; call apply_clear on the model or pipeline."
            )
        text_length = None if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        sequence = hidden_states.shape[1] + (text_length or 0)
        self._refuse_unknown_layer()
        window, forward = None, None
        exported = torch.compiler.is_exporting() and self.tracker.announced is None
        if torch.compiler.is_compiling() and not (exported and self.grid is not None):
            layout, window = self.tracker.compiled(self.of_layer)
            forward = Forward(layout)
        else:
            forward = self._find_forward(sequence, text_length, rotary)
        layout, share = forward.layout, forward.share
        tables = Tables()
        if rotary is not None:
            make = functools.partial(_by_position, rotary, layout)
            tables = Tables.of(rotary[0], make, share)
        if share is not None:
            layout = share.layout
        stream = layout if text_length is None else layout.image_only
        hidden_states = stream.to_local(hidden_states)
        halo = None if share is None else share.send(attn, hidden_states)

        query, key, value, text_query, text_key, text_value = _get_qkv_projections(
            attn, hidden_states, encoder_hidden_states
        )
        # -1 takes up the heads: under tensor parallelism a rank holds only some of them.
        query, key, value = (x.unflatten(-1, (-1, attn.head_dim)) for x in (query, key, value))
        beside = None if branch is None else branch(query)
        if attn.added_kv_proj_dim is None:
            text_query, text_key, text_norms = None, None, (None, None)
        else:
            text_query, text_key, text_value = (
                x.unflatten(-1, (-1, attn.head_dim)) for x in (text_query, text_key, text_value)
            )
            text_norms = attn.norm_added_q, attn.norm_added_k
            value = torch.cat([text_value, value], dim=1)
        place = functools.partial(_place, attn, (query, key), (text_query, text_key), text_norms)
        scaled = self._scaled(place, tables.further)
        del place
        query = norm_and_rotate(query, attn.norm_q, tables.near, text_query, text_norms[0])
        key = norm_and_rotate(key, attn.norm_k, tables.near, text_key, text_norms[1])

        shared = None
        if share is not None:
            shared = Shared.of(share, functools.partial(_key_value, attn, halo, tables.halo))
        out = self._local(
            (query, key, value),
            layout,
            forward.valid_text,
            window,
            scaled,
            shared,
            forward.interval,
        )
        out = out.flatten(2, 3).to(query.dtype)
        del query, key, value, scaled  # three tensors of the sequence's size, or more
        if encoder_hidden_states is None:
            return layout.to_layer(out)
        text, image = out.tensor_split([layout.text_length], dim=1)
        image = attn.to_out[1](attn.to_out[0](stream.to_layer(image).contiguous()))
        text = attn.to_add_out(text.contiguous())
        return (image, text) if beside is None else (image, text, stream.to_layer(beside))

    def _scaled(
        self, place: Callable[[Rotary], Rotated], tables: Sequence[Rotary]
    ) -> Scaled | None:
        """Query and key by scaled positions, where tokens have several.

        Args:
            place: makes query and key, (batch, sequence, heads, head_dim) each, by a table.
            tables: by scaled positions, the least scaled first; none where tokens have one.
        """
        if not tables:
            return None
        # Positions between are of far keys.
        *between, last = tables if self.tracker.far_levels else tables[-1:]
        if not between:  # what is projected need not be kept
            far = _autocast_by(place, last)
            return Scaled(lambda: far)
        return Scaled(
            functools.partial(_autocast_by, place, last),
            [functools.partial(_autocast_by, place, each) for each in between],
        )

    def _local(
        self,
        tensors: Projected,
        layout: Layout,
        valid_text: ValidText | None = None,
        window: Window | None = None,
        scaled: Scaled | None = None,
        shared: Shared | None = None,
        interval: int = 0,
    ) -> torch.Tensor:
        """Local attention with the processor's settings.

        Args:
            tensors: query, key, value, (batch, sequence, heads, head_dim) each, in the order of
                `Layout.to_local`.
            valid_text: where the batch's prompts have different lengths.
            window: of the layout, where torch.compile traces it; else the tracker's.
            scaled: query and key again, rotated by scaled positions, where tokens have several.
            shared: the image, where ranks share it; layout and tensors are then of this rank.
            interval: of noise levels, see `Forward`.
        """
        tensors = _autocast(tensors)
        if valid_text is not None:
            return attend_without_padding(
                tensors[0].shape[0],
                valid_text,
                layout.text_length,
                lambda row: self._local(
                    row.tokens(*tensors),
                    layout._replace(text_length=len(row.places)),
                    scaled=None
                    if scaled is None
                    else scaled.after(lambda rotated: _pair(row.tokens(*rotated))),
                    shared=None if shared is None else shared.of_row(row),
                    interval=interval,
                ),
            )
        compiling, query = torch.compiler.is_compiling(), tensors[0]
        elsewhere = 0 if shared is None else shared.image.elsewhere
        options = {
            "scale": self._scale(tensors[1].shape[1] + elsewhere, query.shape[-1]),
            "impl": self.tracker.impl if compiling else self.impl,
            **self._learned(query.device),
        }
        if shared is not None:
            out: torch.Tensor = shared.image.attend(tensors, scaled, shared.arrived, **options)
            return out
        if window is None:
            window = self.tracker.window(layout, self.layer_radii[interval])
        return self._attention(tensors, scaled, window, **options)

    def _attention(
        self,
        tensors: Projected,
        scaled: Scaled | None,
        window: Window,
        **options: Any,
    ) -> torch.Tensor:
        """Local attention of query, key and value, or full; `scaled` as in `_local`."""
        if window.sees_everything:
            # What is learned of pooled keys means nothing then, and no choice of kernels either.
            scale = options["scale"]
            if scaled is None:
                out = local_attention(*tensors, window, scale=scale)
                assert isinstance(out, torch.Tensor)
                return out
            query, key, value = tensors
            disc = replace(window, radius=self.radius)
            return full_two_position_attention((query, key), scaled.far(), value, disc, scale=scale)
        if scaled is not None:
            query, key, value = tensors
            return two_position_attention((query, key), scaled, value, window, **options)
        out = local_attention(*tensors, window, **options)
        assert isinstance(out, torch.Tensor)
        return out

    def _learned(self, device: torch.device) -> dict[str, torch.Tensor | None]:
        """What is learned of pooled keys, as `local_attention` takes it."""
        names = ("spatial_weight", "far_offset")
        if self.spatial_weight is None and self.far_weight is None:
            return dict.fromkeys(names)
        # By way of `forward`, which is what offloading in accelerate and diffusers wraps.
        found = (None if x is None else x.to(device) for x in self.forward())
        return dict(zip(names, found, strict=True))

    def _scale(self, sequence: int, head_dim: int) -> float:
        if self.proportional_base is None:
            return head_dim**-0.5
        return math.sqrt(math.log(sequence, self.proportional_base) / head_dim)

    def _find_forward(
        self,
        sequence: int,
        text_length: int | None,
        rotary: Rotary | None,
    ) -> Forward:
        self.tracker.say_far()
        forward = self.tracker.current
        if self.grid is not None and forward is None:
            self.tracker.refuse_unknown_level()
            text = sequence - self.grid[0] * self.grid[1]
            if text < 0 or text_length not in (None, text):
                raise ValueError(
                    f"CLEARProcessor: grid={self.grid} means {self.grid[0] * self.grid[1]} image "
                    f"tokens, but the sequence has {_tokens(sequence, text_length)}. Correct the "
                    "grid, or leave it out: it is found."
                )
            return Forward(Layout(text, *self.grid))
        if rotary is not None:
            forward = self.tracker.find(rotary, text_length, self.references == "local")
        if forward is None:
            raise ValueError(
                "CLEARProcessor: without image_rotary_emb the token grid cannot be found; pass "
                "CLEARProcessor(grid=(rows, columns))."
            )
        if forward.share is not None:
            sequence += forward.share.elsewhere
        layout = forward.layout
        if layout.sequence_length != sequence or text_length not in (None, layout.text_length):
            raise ValueError(
                f"CLEARProcessor: the position ids describe {layout.text_length} text tokens and "
                f"{layout.rows} x {layout.columns} image tokens{layout.and_references}, but the "
                f"sequence has {_tokens(sequence, text_length)}."
            )
        return forward

    def _refuse_unknown_layer(self) -> None:
        # What torch.compile traces would be compiled anew for other radii; `compiled` refuses too.
        if not torch.compiler.is_compiling() and not self.layer_radii:
            raise ValueError(
                "CLEARProcessor: radii by layer or noise level need apply_clear or "
                "CLEARPipeline.set_attn_processor, which know names and levels; "
                "set_attn_processor takes one radius, or a dict with a processor for each layer."
            )

    def _refuse_foreign_settings(self, attention_mask: torch.Tensor | None) -> None:
        if attention_mask is not None:
            raise ValueError(
                "CLEARProcessor: attention_mask must be None (the window is the mask), got a mask "
                f"of shape {tuple(attention_mask.shape)}."
            )
        if self._attention_backend is not None:
            raise ValueError(
                f"CLEARProcessor: diffusers' attention backend {str(self._attention_backend)!r} "
                "does not apply to CLEAR attention; call reset_attention_backend() and choose with "
                "impl=."
            )
        if self._parallel_config is not None:
            raise ValueError(
                "CLEARProcessor: diffusers' context parallelism is not supported: it splits the "
                "sequence without regard to the token grid."
            )


def _autocast(tensors: tuple[torch.Tensor, ...]) -> Any:
    """Query, key (and value) as `scaled_dot_product_attention` takes them under torch.autocast."""
    kind = tensors[0].device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _autocast_by(place: Callable[[Rotary], Rotated], table: Rotary) -> Rotated:
    """What `place` makes, as attention takes it."""
    return _pair(_autocast(place(table)))


def _pair(tensors: Iterable[torch.Tensor]) -> Rotated:
    query, key = tensors
    return query, key


def _by_position(rotary: Rotary, layout: Layout) -> list[Rotary]:
    """FLUX's table, in a layer's order, position by position and in that of local attention."""
    if layout.reference_length:
        rotary = tuple(layout.to_local(table[None])[0] for table in rotary)
    return list(zip(rotary[::2], rotary[1::2], strict=True))


def _place(
    attn: Any,
    projected: Rotated,
    of_text: tuple[torch.Tensor | None, torch.Tensor | None],
    text_norms: tuple[Any, Any],
    rotary: Rotary,
) -> Rotated:
    """Query and key, (batch, text + image, heads, head_dim) each; see `norm_and_rotate`."""
    (query, key), (text_query, text_key) = projected, of_text
    return (
        norm_and_rotate(query, attn.norm_q, rotary, text_query, text_norms[0]),
        norm_and_rotate(key, attn.norm_k, rotary, text_key, text_norms[1]),
    )


def _key_value(attn: Any, halo: Any, rotary: Rotary | None) -> Rotated:
    """Key and value, (batch, tokens, heads, head_dim), of the neighbours' rows."""
    hidden_states = halo.wait()
    if attn.fused_projections:
        _, key, value, *_ = _get_qkv_projections(attn, hidden_states)
    else:
        key, value = attn.to_k(hidden_states), attn.to_v(hidden_states)
    key, value = (x.unflatten(-1, (-1, attn.head_dim)) for x in (key, value))
    return norm_and_rotate(key, attn.norm_k, rotary), value


def _tokens(sequence: int, text_length: int | None) -> str:
    known = "" if text_length is None else f", {text_length} of them text"
    return f"{sequence} tokens{known}"


def _check_far(far: object, pooled_weight: object, radius: int, down_factor: int) -> None:
    if far is not None and not isinstance(far, bool):
        raise ValueError(f"CLEARProcessor: far must be True, False or None, got {far!r}.")
    if far and down_factor > 1:
        raise ValueError(
            f"CLEARProcessor: far keys and pooled keys exclude each other, got far=True and "
            f"down_factor={down_factor}; leave one of them out."
        )
    if far and radius == 1:
        raise ValueError(
            "CLEARProcessor: far keys need a radius of at least 2, got radius=1; take a larger one "
            "or far=False."
        )
    if pooled_weight not in POOLED_WEIGHTS:
        raise ValueError(
            f"CLEARProcessor: pooled_weight must be {' or '.join(POOLED_WEIGHTS)}, got "
            f"{pooled_weight!r}."
        )
    if pooled_weight != "one" and down_factor == 1:
        raise ValueError(
            f"CLEARProcessor: pooled_weight={pooled_weight!r} is for the pooled keys of "
            "down_factor > 1, got down_factor=1; leave it out (far keys always count)."
        )


def _parameter(shape: tuple[int, ...], value: float) -> nn.Parameter:
    """With values where the default device is "meta", and unrounded whatever the default dtype."""
    device = "cpu" if torch.get_default_device().type == "meta" else None
    return nn.Parameter(torch.full(shape, value, dtype=torch.float32, device=device))
