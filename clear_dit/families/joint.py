"""What the processors of the families beside FLUX.1 share.

A family says how its layers project and norm tokens (`Stream`), how they are rotated by a table
(`place`, `tables`), and what becomes of the output; `attend` does the rest: the order of tokens,
padded text, several positions a token, and ranks that share an image. Where the tokens are it is
told: by `apply_clear`'s hook on the model, which reads the arguments of every forward.

A rotary table that holds several positions a token has them side by side in its last dimension,
the true ones first, then the least scaled: (tokens, positions * head_dim), or half as many complex
numbers.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from ..attention.layout import Layout
from ..attention.norm_rope import Rotary, norm_and_rotate
from ..attention.processor import CLEARProcessor, Shared, Tables
from ..attention.text_padding import Projected, ValidText
from ..attention.tracker import Forward, WindowTracker
from ..kernels.two_positions import Rotated
from ..kernels.window import Window


class Stream(NamedTuple):
    """How a layer projects and norms tokens of one kind.

    Attributes:
        linears: of query, key and value; or one for all three, one behind the other.
        norms: of query and key, over head_dim; None for no norm.
        head_dim: channels of a head. Under tensor parallelism a rank holds only some heads.
    """

    linears: tuple[Any, ...]
    norms: tuple[Any, Any]
    head_dim: int

    def project(self, tokens: torch.Tensor) -> Projected:
        """Query, key and value, (batch, tokens, heads, head_dim) each."""
        if len(self.linears) == 1:
            parts = self.linears[0](tokens).chunk(3, dim=-1)
        else:
            parts = [linear(tokens) for linear in self.linears]
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)
        return query, key, value

    def key_value(self, tokens: torch.Tensor) -> Rotated:
        """Key and value alone."""
        if len(self.linears) == 1:
            return self.project(tokens)[1:]
        key, value = (
            linear(tokens).unflatten(-1, (-1, self.head_dim)) for linear in self.linears[1:]
        )
        return key, value


class Turn(NamedTuple):
    """A layer's turn in the forward under way.

    Attributes:
        layout: of the layer's tokens; where ranks share the image, of this rank's.
        whole: of all ranks' together.
        apart: whether the layer has text and image apart, or the image alone.
        forward: what the layers share.
        window: where torch.compile traces the layer.
    """

    layout: Layout
    whole: Layout
    apart: bool
    forward: Forward
    window: Window | None = None

    @property
    def order(self) -> Layout:
        """The layout of the tokens beside which text may come."""
        return self.layout.image_only if self.apart else self.layout

    @property
    def valid_text(self) -> ValidText | None:
        """Which text tokens of the layer are no padding."""
        return self.forward.valid_text if self.layout.text_length else None

    @property
    def behind_text(self) -> Turn:
        """That of the image alone, where it sees keys of the forward's text."""
        text = self.forward.layout.text_length
        return self._replace(
            layout=self.layout._replace(text_length=text),
            whole=self.whole._replace(text_length=text),
        )

    def with_text(self, length: int) -> Turn:
        """The same with other tokens of text, all valid, which every query sees."""
        return self._replace(
            layout=self.layout._replace(text_length=length),
            whole=self.whole._replace(text_length=length),
            forward=self.forward._replace(valid_text=None),
            window=None,
        )


class JointProcessor(CLEARProcessor):
    """A `CLEARProcessor` that belongs to one layer; families implement `__call__`.

    Its arguments are those of the stock processor it takes the place of.

    Args:
        settings: the processor whose settings this one takes.
        tracker: that of all layers of a model.
    """

    def __init__(
        self, settings: CLEARProcessor | None = None, tracker: WindowTracker | None = None
    ) -> None:
        super().__init__(**({} if settings is None else settings.settings))
        self.blank: bool = settings is None  # made again by diffusers, see `weights/reconcile.py`
        if tracker is not None:
            self.tracker = tracker

    @classmethod
    def for_layer(
        cls, settings: CLEARProcessor, tracker: WindowTracker, old: Any
    ) -> JointProcessor:
        """The processor that takes the place of `old`."""
        return cls(settings, tracker)

    def stock(self) -> Any:
        """What it takes the place of, where one layer may have several such; else None."""
        return None

    def tables(self, rotary: Rotary, turn: Turn) -> Rotary:
        """A family's rotary table for text, references and image, in this order.

        Args:
            rotary: what the layer got, of the tokens of all ranks.
            turn: whose `whole` is their layout.

        Returns:
            For `place`: (tokens, channels) each, or (1 or batch, tokens, channels).
        """
        return tuple(turn.whole.to_local(table[None])[0] for table in rotary)

    def place(
        self,
        tokens: torch.Tensor,
        norm: Any,
        table: Rotary | None,
        text: torch.Tensor | None = None,
        text_norm: Any = None,
    ) -> torch.Tensor:
        """Query or key normed, text before image, and rotated by one position of `tables`.

        Arguments and result are those of `norm_and_rotate`.
        """
        return norm_and_rotate(tokens, norm, table, text, text_norm)

    def turn(self, image: int, text: int | None = None, key: torch.Tensor | None = None) -> Turn:
        """The layer's turn.

        Args:
            image: tokens the layer got: of the image and references, or of the whole sequence.
            text: tokens of text that came apart from them, if so.
            key: see `WindowTracker.told`.

        Raises:
            ValueError: the numbers contradict the forward under way.
        """
        self._refuse_unknown_layer()
        window = None
        if torch.compiler.is_compiling():
            layout, window = self.tracker.compiled(self.of_layer)
            forward = Forward(layout)
        else:
            forward = self.tracker.told(key)
            layout = forward.layout if forward.share is None else forward.share.layout
        whole = forward.layout
        if text is not None:
            _check_length(layout, layout.text_length, text, "text")
            _check_length(layout, layout.image_only.sequence_length, image, "image")
        elif image in (layout.image_only.sequence_length, layout.image_length):  # alone
            alone: dict[str, Any] = {"text_length": 0}
            if image == layout.image_length:
                alone |= {"reference_length": 0, "local_references": ()}
            layout, whole, window = layout._replace(**alone), whole._replace(**alone), None
        else:
            _check_length(layout, layout.sequence_length, image, "sequence")
        return Turn(layout, whole, text is not None, forward, window)

    def attend(
        self,
        attn: Any,
        tokens: torch.Tensor,
        stream: Stream,
        text: torch.Tensor | None = None,
        text_stream: Stream | None = None,
        rotary: Rotary | None = None,
        key: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's attention, from its input to what its output projections take.

        Args:
            attn: the layer.
            tokens: (batch, tokens, channels): image and references, or the whole sequence.
            stream: how they are projected.
            text: (batch, text, channels), where the layer has text apart; and how it is projected.
            rotary: what `tables` takes; None where tokens are not rotated.
            key: see `WindowTracker.told`.

        Returns:
            The same tokens, and the text where it is apart (else an empty tensor), (batch, tokens,
            heads * head_dim) each.
        """
        turn = self.turn(tokens.shape[1], None if text is None else text.shape[1], key)
        tokens = turn.order.to_local(tokens)
        halo = self.send(turn, attn, tokens)
        out = self.attend_projected(
            turn,
            stream.project(tokens),
            stream,
            None if text is None or text_stream is None else text_stream.project(text),
            text_stream,
            rotary,
            halo,
        )
        return self.split(turn, out)

    def split(self, turn: Turn, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What `attend` returns, of what `attend_projected` does."""
        text, image = out.tensor_split([turn.layout.text_length if turn.apart else 0], dim=1)
        return turn.order.to_layer(image), text

    def send(self, turn: Turn, attn: Any, tokens: torch.Tensor) -> Any:
        """Where ranks share the image, start to send neighbours what they need of it.

        Args:
            tokens: (batch, ... + image, channels), from which `Stream.key_value` makes keys and
                values.
        """
        share = turn.forward.share
        return None if share is None else share.send(attn, tokens)

    def attend_projected(
        self,
        turn: Turn,
        projected: Projected,
        stream: Stream,
        of_text: Projected | None = None,
        text_stream: Stream | None = None,
        rotary: Rotary | None = None,
        halo: Any = None,
    ) -> torch.Tensor:
        """Local attention of what `Stream.project` returned; see `attend`.

        Args:
            projected: query, key, value of tokens in the order of `turn.order.to_local`.
            halo: from `send`.

        Returns:
            (batch, sequence, heads * head_dim), in the order of `turn.layout.to_local`.
        """
        query, key, value = projected
        text_query, text_key, text_value = of_text or (None, None, None)
        text_norms = (None, None) if text_stream is None else text_stream.norms
        if text_value is not None:
            value = torch.cat([text_value, value], dim=1)
        tables, share = Tables(), turn.forward.share
        if rotary is not None:
            make = functools.partial(self._by_position, rotary, turn, stream.head_dim)
            tables = Tables.of(rotary[0], make, share)
        both, both_of_text = (query, key), (text_query, text_key)
        place = functools.partial(self._place, both, stream.norms, both_of_text, text_norms)
        scaled = self._scaled(place, tables.further)
        del projected, of_text, text_value, both, both_of_text, place
        query = self.place(query, stream.norms[0], tables.near, text_query, text_norms[0])
        key = self.place(key, stream.norms[1], tables.near, text_key, text_norms[1])
        shared = None
        if halo is not None:
            arrived = functools.partial(self._arrived, stream, halo, tables.halo)
            shared = Shared.of(share, arrived)
        tensors, interval = (query, key, value), turn.forward.interval
        out = self._local(
            tensors, turn.layout, turn.valid_text, turn.window, scaled, shared, interval
        )
        return out.flatten(2, 3).to(query.dtype)

    def _by_position(self, rotary: Rotary, turn: Turn, head_dim: int) -> list[Rotary]:
        return _positions_of(self.tables(rotary, turn), head_dim)

    def _place(
        self,
        projected: Rotated,
        norms: tuple[Any, Any],
        of_text: tuple[torch.Tensor | None, torch.Tensor | None],
        text_norms: tuple[Any, Any],
        table: Rotary,
    ) -> Rotated:
        query, key = (
            self.place(tokens, norm, table, text, text_norm)
            for tokens, norm, text, text_norm in zip(
                projected, norms, of_text, text_norms, strict=True
            )
        )
        return query, key

    def _arrived(self, stream: Stream, halo: Any, table: Rotary | None) -> Rotated:
        key, value = stream.key_value(halo.wait())
        return self.place(key, stream.norms[1], table), value


def image_tables(rotary: Rotary, turn: Turn) -> Rotary:
    """`JointProcessor.tables` where the table is the image's alone: text has an angle of zero.

    Args:
        rotary: cos and sin, (image, channels) each.
    """
    cos, sin = rotary
    before = (0, 0, turn.whole.text_length, 0)
    return functional.pad(cos, before, value=1.0), functional.pad(sin, before)


def _positions_of(tables: Rotary, head_dim: int) -> list[Rotary]:
    """A table, position by position: the true ones first, then the least scaled.

    Args:
        tables: (..., tokens, positions * head_dim) each, or half as many complex numbers.
    """
    channels = head_dim // 2 if tables[0].is_complex() else head_dim
    positions = tables[0].shape[-1] // channels
    if positions == 1:
        return [tables]
    parts = ((part.contiguous() for part in one.chunk(positions, dim=-1)) for one in tables)
    return list(zip(*parts, strict=True))


def _check_length(layout: Layout, expected: int, received: int, what: str) -> None:
    if received != expected:
        raise ValueError(
            f"CLEARProcessor: the forward under way has {layout.text_length} text tokens and "
            f"{layout.rows} x {layout.columns} image tokens{layout.and_references}, but the "
            f"layer's {what} has {received}."
        )
