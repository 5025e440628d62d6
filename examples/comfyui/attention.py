"""CLEAR's attention in ComfyUI's places for it: a wrapper of the forward, a patch, an override."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from clear_dit import local_attention
from clear_dit.attention.layout import Layout
from clear_dit.attention.text_padding import Projected, ValidText, attend_without_padding
from clear_dit.kernels.cells import FAR_LEVELS

from .adapter import WEIGHTS, Adapter
from .forward import KEY, Forward, check_latent, known, read_ids
from .layers import layer_number
from .masks import CannotHonourError, visible_text

logger = logging.getLogger("clear_dit.comfyui")

# Of ComfyUI's attention functions, in their order.
ARGUMENTS = (
    "q", "k", "v", "heads", "mask", "attn_precision", "skip_reshape", "skip_output_reshape",
)  # fmt: skip
# What else they take, which changes nothing or is honoured.
UNDERSTOOD = {
    *ARGUMENTS, "transformer_options", "scale", "enable_gqa", "low_precision_attention",
    "_inside_attn_wrapper", "preferred_attention",
}  # fmt: skip
# Of a forward's options: what another forward may have left there.
OF_BLOCKS = ("block_type", "block_index", "total_blocks", "img_slice")

Onward = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Settings:
    """What the node "CLEAR attention" says.

    Attributes:
        radius: of the disc, in tokens.
        far: whether there are far keys; None does as the weights were made for, and without any
            takes them.
        dense_above: sigma above which every layer attends in full.
        dense_layers: numbers of layers that always do.
    """

    radius: int
    far: bool | None = None
    dense_above: float = float("inf")
    dense_layers: frozenset[int] = frozenset()


class Attention:
    """CLEAR's attention of one node; shared by all clones of its model, and not changed by them.

    Args:
        settings: the node's.
        previous: the override that the model had, which gets all attention that stays full.
    """

    def __init__(self, settings: Settings, previous: Onward | None = None) -> None:
        self.settings = settings
        self.previous = previous
        self._window = functools.lru_cache(maxsize=16)(Layout.window)
        self._said: set[str] = set()

    # Compiled models call these as they are: ComfyUI drops what the compiler would check of
    # transformer_options, and a compiled geometry would outlive the forward that it belongs to.
    @torch.compiler.disable(recursive=False)
    def wrapper(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Around a forward of the diffusion model: begins a `Forward` in options of its own.

        Raises:
            ValueError: geometry that cannot be known, or that no attention came by here.
        """
        names = list(inspect.signature(executor.original).parameters)
        given = dict(zip(names, args, strict=False)) | kwargs
        model, kind = executor.class_obj, known(executor.class_obj)
        check_latent(model, given)
        options = given.get("transformer_options") or {}
        forward = Forward(model, dense=self._is_dense(options))
        if kind.read is not None:
            forward.layout = kind.read(model, given)
        own = {name: value for name, value in options.items() if name not in OF_BLOCKS}
        own[KEY] = forward
        position = names.index("transformer_options") if "transformer_options" in names else None
        if position is not None and position < len(args):
            args = (*args[:position], own, *args[position + 1 :])
        else:
            kwargs = kwargs | {"transformer_options": own}
        out = executor(*args, **kwargs)
        if not forward.attended and _is_first_step(options):  # later a cache may skip all blocks
            raise ValueError(
                "CLEAR attention: the model's attention did not come to this node: another node "
                "replaces it, or this ComfyUI is too old. Put CLEAR attention last before the "
                "sampler, or take the other node out."
            )
        return out

    @torch.compiler.disable
    def post_input(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """A patch of the kind "post_input": reads the position ids, changes nothing."""
        forward = (given.get("transformer_options") or {}).get(KEY)
        if forward is not None:
            forward.layout = read_ids(given)
        return given

    @torch.compiler.disable
    def override(self, func: Onward, *args: Any, **kwargs: Any) -> torch.Tensor:
        """In the place of ComfyUI's attention.

        Args:
            func: ComfyUI's own.
            args, kwargs: its arguments; q, k, v are (batch, heads, tokens, head_dim) with
                skip_reshape, else (batch, tokens, heads * head_dim); positions are in them.

        Returns:
            (batch, tokens, heads * head_dim), or (batch, heads, tokens, head_dim) with
            skip_output_reshape.

        Raises:
            ValueError: a sequence that is not what the model announced.
        """

        def full() -> torch.Tensor:
            if self.previous is not None:
                return self.previous(func, *args, **kwargs)
            return func(*args, **kwargs)

        given = dict(zip(ARGUMENTS, args, strict=False)) | kwargs
        options = given.get("transformer_options") or {}
        forward = options.get(KEY)
        if forward is None:  # a text encoder, a ControlNet, another model
            return full()
        query, key, value = heads_apart(given)
        number = layer_number(forward.model, options)
        forward.attended += number is not None
        layout = forward.of_layer(number, query.shape[1], key.shape[1])
        adapter = options.get(WEIGHTS) or Adapter()
        if layout is None:
            if number is not None:
                self._say("attention over other keys than the sequence's own stays full")
            return full()
        if self._sees_everything(forward, number, adapter, layout):
            return full()
        try:
            valid = visible_text(given.get("mask"), query.shape[0], layout)
        except CannotHonourError:
            self._say(
                "an attention mask over the image (Redux, regional prompts) keeps attention full"
            )
            return full()
        if strange := kwargs.keys() - UNDERSTOOD:
            self._say(f"attention with {', '.join(sorted(strange))} stays full")
            return full()
        options_of_layer = adapter.of_layer(number, self._far_levels(adapter), query.device)
        if given.get("scale") is not None:
            options_of_layer["scale"] = float(given["scale"])
        tensors = layout.to_local(query), layout.to_local(key), layout.to_local(value)
        out = layout.to_layer(self._local(tensors, layout, valid, adapter, options_of_layer))
        return out.transpose(1, 2) if given.get("skip_output_reshape") else out.flatten(2)

    def _sees_everything(
        self, forward: Forward, number: int | None, adapter: Adapter, layout: Layout
    ) -> bool:
        """Whether a layer's attention is full: then ComfyUI's own does it."""
        corner = (layout.rows - 1) ** 2 + (layout.columns - 1) ** 2
        covered = self.settings.radius**2 > corner and adapter.down_factor == 1
        return forward.dense or covered or number in self.settings.dense_layers

    def _local(
        self,
        tensors: Projected,
        layout: Layout,
        valid: ValidText | None,
        adapter: Adapter,
        options: Mapping[str, Any],
    ) -> torch.Tensor:
        """(batch, tokens, heads, head_dim), in the order of `Layout.to_local`."""
        if valid is not None:
            return attend_without_padding(
                tensors[0].shape[0], valid, layout.text_length,
                lambda row: self._local(
                    row.tokens(*tensors), layout._replace(text_length=len(row.places)), None,
                    adapter, options,
                ),
            )  # fmt: skip
        window = self._window(
            layout, self.settings.radius, adapter.down_factor, self._far_levels(adapter),
            adapter.pooled_weight,
        )  # fmt: skip
        out = local_attention(*tensors, window, **options)
        assert isinstance(out, torch.Tensor)
        return out

    def _far_levels(self, adapter: Adapter) -> int:
        far = self.settings.far
        if far and adapter.down_factor > 1:
            raise ValueError(
                f"CLEAR attention: the CLEAR weights {adapter.name} are for pooled keys "
                f"(down_factor={adapter.down_factor}), which exclude far keys; set far to auto."
            )
        if far is None:
            far = adapter.far is not False and adapter.down_factor == 1 and self.settings.radius > 1
        return FAR_LEVELS if far else 0

    def _is_dense(self, options: Mapping[str, Any]) -> bool:
        bound = self.settings.dense_above
        if bound == float("inf"):
            return False
        sigmas = options.get("sigmas")
        if sigmas is None:
            raise ValueError(
                "CLEAR attention: dense_until needs the noise level, which this sampler does not "
                "tell (transformer_options has no sigmas); set dense_until to 0."
            )
        above = {sigma > bound for sigma in torch.as_tensor(sigmas).flatten().tolist()}
        if len(above) > 1:
            raise ValueError(
                "CLEAR attention: the images of a batch are on both sides of dense_until; make "
                "them one by one, or set dense_until to 0."
            )
        return above.pop()

    def _say(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            logger.warning("CLEAR attention: %s", what)


def _is_first_step(options: Mapping[str, Any]) -> bool:
    """Whether a forward is of a sampling's first step; yes where that cannot be told."""
    now, schedule = options.get("sigmas"), options.get("sample_sigmas")
    if now is None or schedule is None:
        return True
    return float(torch.as_tensor(now).max()) >= 0.999 * float(schedule[0])


def heads_apart(given: Mapping[str, Any]) -> list[torch.Tensor]:
    """Query, key and value, (batch, tokens, heads, head_dim), of an attention call's arguments."""
    tensors = [given[name] for name in "qkv"]
    if given.get("skip_reshape"):
        return [x.transpose(1, 2) for x in tensors]
    head_dim = tensors[0].shape[-1] // given["heads"]  # key and value may have fewer heads
    return [x.unflatten(2, (-1, head_dim)) for x in tensors]
